"""The price of sharing heads in one layer: measured by running the model, and from that layer alone.

    python benchmarks/layer_prices.py                                              # austen-mha, 48 blocks of 256 tokens
    python benchmarks/layer_prices.py --model smollm2-135m --blocks 16 --length 512

For every layer, kind of heads and number of heads kept: `measured`, the KL divergence in nats per token from the source's
predictions on the held-out pieces; `slopes`, the same to second order from one backward pass; `stream`, the relative error
of the residual stream behind the attention, which needs no backward pass (but is timed with one). The seconds of
each way, for all layers together, stand in every row.
"""

import argparse
import time
from pathlib import Path

import torch
from inputs import add_inputs, parsed
from tqdm import tqdm

from dha_utils import load_checkpoint, load_text, token_blocks
from dha_utils.measure.stream import each_layer
from dha_utils.plan.prices import KINDS, PriceWalk
from dha_utils.runs import write_whole


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "austen-mha", "layer_prices")
    parser.add_argument("--blocks", type=int, default=48, help="calibration blocks")
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    return parsed(parser)


class StreamError(PriceWalk):
    """Prices a layer by what a change does to the stream, with every direction of it alike."""

    def divergence(self, index, layer, shared, unshared):
        return ((shared - unshared).square().sum(-1) / unshared.square().sum(-1)).mean()


def main():
    arguments = parse_arguments()
    name = Path(arguments.model).name
    model, tokenizer = load_checkpoint(arguments.model)
    blocks = token_blocks(tokenizer, load_text(arguments.text, "train"), arguments.length, arguments.blocks)
    prices, seconds = {}, {}
    for way, walk in {
        "measured": lambda: PriceWalk(model, blocks, alone="measured"),
        "slopes": lambda: PriceWalk(model, blocks),
        "stream": lambda: StreamError(model, blocks),
    }.items():
        begin, pricing = time.perf_counter(), walk()
        layers = tqdm(each_layer(model), way, len(model.model.layers))
        prices[way] = torch.stack([pricing.price(index, layer)[1] for index, layer in layers])
        seconds[f"{way}_seconds"] = time.perf_counter() - begin
    rows = ["model,text,layer,kind,heads_kept,measured,slopes,stream,threads," + ",".join(seconds)]
    for layer, kind, place in torch.cartesian_prod(*map(torch.arange, prices["measured"].shape)).tolist():
        figures = [prices[way][layer, kind, place].item() for way in prices]
        case = [name, arguments.text, layer, KINDS[kind], pricing.grid[place]]
        columns = [*case, *(f"{x:.6g}" for x in figures), torch.get_num_threads(), *(f"{s:.4g}" for s in seconds.values())]
        rows.append(",".join(map(str, columns)))
    write_whole(arguments.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
