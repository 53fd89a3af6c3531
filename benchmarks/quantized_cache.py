"""Fewer heads and fewer bits: perplexity over a quantised KV cache, for the source and for DHA.

    pip install optimum-quanto
    python benchmarks/quantized_cache.py                      # smollm2-135m, source and 50, 33 %; 40 minutes on one core

Each validation block is read in pieces of 64 tokens over transformers' `QuantizedCache` (quanto, groups of 64 numbers), as
in chunked prefill. After every second piece all that is cached is quantised anew, so at most the piece before is exact.
Bytes are counted on the tensors of the cache after the last piece (64 of 512 tokens exact), each floating-point number as
the two bytes that it has in 16 bits. DHA is refitted on 16,384 tokens, not trained. Rows that the CSV already has are not
measured again.
"""

import argparse
from pathlib import Path

import torch
from inputs import add_inputs, parsed, source_and_text
from recovery import refitted_start
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, QuantizedCache

from dha_utils.measure.perplexity import scored_tokens
from dha_utils.runs import append_rows, has_row

PIECE = 64
EXACT = 16  # bits: not quantised


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "smollm2-135m", "quantized_cache")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 1 / 3])
    parser.add_argument("--bits", type=int, nargs="+", default=[EXACT, 4, 2])
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=32)
    parser.add_argument("--validation-blocks", type=int, default=8)
    return parsed(parser)


def make_cache(model, bits):
    if bits == EXACT:
        return DynamicCache(config=model.config)
    return QuantizedCache("quanto", model.config, nbits=bits, q_group_size=PIECE, residual_length=2 * PIECE)


@torch.no_grad()
def block_loss(model, block, cache):
    """The LM loss in nats of the tokens of a block [length], read piece by piece over the cache."""
    losses = []
    for start in range(0, len(block) - 1, PIECE):
        logits = model(block[None, start : start + PIECE], past_key_values=cache).logits[0]
        following = block[start + 1 : start + 1 + PIECE]
        losses.append(cross_entropy(logits[: len(following)].float(), following, reduction="none"))
    return torch.cat(losses).mean()


def held_bytes(states):
    """Bytes of a tensor, of a quantised one with its scales, or of None; floating-point numbers have two."""
    if states is None:
        return 0
    if hasattr(states, "__tensor_flatten__"):
        return sum(held_bytes(getattr(states, part)) for part in states.__tensor_flatten__()[0])
    return states.numel() * (2 if states.is_floating_point() else states.element_size())


def cache_bytes(cache):
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(held_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def main():
    arguments = parse_arguments()
    source, tokenizer, training, validation = source_and_text(arguments)
    setting = {"model": Path(arguments.model).name, "text": arguments.text, "tokens": arguments.length}
    setting["validation_tokens"] = scored_tokens(validation)
    for budget in arguments.budgets:
        calibration_tokens = arguments.calibration_blocks * arguments.length if budget < 1 else 0
        named = setting | {"budget": round(budget, 4), "calibration_tokens": calibration_tokens}
        missing = [bits for bits in arguments.bits if not has_row(arguments.out, named | {"bits": bits})]
        model = source
        if missing and budget < 1:
            model = refitted_start(arguments, source, tokenizer, training, budget)
        for bits in missing:
            losses = []
            for block in validation:
                cache = make_cache(model, bits)
                losses.append(block_loss(model, block, cache))
            figures = {"perplexity": torch.stack(losses).mean().exp().item(), "cache_bytes": cache_bytes(cache)}
            append_rows(arguments.out, [named | {"bits": bits} | figures])


if __name__ == "__main__":
    main()
