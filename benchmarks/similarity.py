"""Which pairwise measure foretells the loss of fusing two heads? Every pair of every layer, fused for real.

    python benchmarks/similarity.py                                            # austen-mha, about 10 minutes on one core
    python benchmarks/similarity.py --model smollm2-135m --length 512 --blocks 16

Half of the calibration blocks make the fusion and the measures, the other half measure what it costs: the rise of the
loss, and the divergence from the source's predictions, which has less noise. Writes one row a pair to
results/similarity_MODEL.csv. The ω score comes from the paper's search, on training text.
"""

import argparse
from itertools import combinations, product
from pathlib import Path

import pandas as pd
import torch
from inputs import add_inputs, parsed
from torch.nn.functional import kl_div, normalize
from tqdm import tqdm

from dha_utils import head_similarity, load_checkpoint, load_text, token_blocks
from dha_utils.measure.energies import head_energies
from dha_utils.measure.moments import with_bias
from dha_utils.measure.perplexity import log_probabilities, scored_tokens, true_losses
from dha_utils.paper.search import search_scores
from dha_utils.plan.prices import KINDS, predictions, shared_in_place
from dha_utils.runs import ROOT, write_whole


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "austen-mha", "similarity")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--blocks", type=int, default=64, help="calibration blocks, half to fuse, half to measure")
    parser.add_argument("--search-steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    return parsed(parser)


@torch.no_grad()
def cosine(model):
    """Cosine of the heads' weights: {"key": [layers, heads, heads], "value": same}."""
    result = {}
    for kind, name in (("key", "k_proj"), ("value", "v_proj")):
        heads = [
            normalize(with_bias(getattr(layer.self_attn, name)).view(model.config.num_key_value_heads, -1))
            for layer in model.model.layers
        ]
        result[kind] = torch.stack([rows @ rows.T for rows in heads])
    return result


def omega_similarity(scores, heads):
    """Minus the mean distance of the ω rows of two source heads' query heads."""
    return {
        kind: -matrix.unflatten(1, (heads, -1)).unflatten(3, (heads, -1)).mean((2, 4)) for kind, matrix in scores.items()
    }


def block_losses(predictions, tokens):
    """Mean LM loss, nats a token, of each block: [blocks], from log-probabilities of the true `tokens` [blocks, n]."""
    return torch.stack([true_losses(prediction, block).mean() for prediction, block in zip(predictions, tokens)])


@torch.no_grad()
def layer_inputs(model, blocks):
    """The hidden states [blocks, length, hidden] that enter each layer."""
    states = [model.model(block[None].to(model.device), output_hidden_states=True, use_cache=False) for block in blocks]
    return [torch.cat(layer) for layer in zip(*(state.hidden_states[:-1] for state in states))]


def mean_divergence(predictions, reference):
    """KL divergence from the `reference`, nats a token; both are `log_probabilities` of the same tokens."""
    pairs = zip(predictions, reference)
    return torch.stack([kl_div(new, old, reduction="batchmean", log_target=True) for new, old in pairs]).mean()


@torch.no_grad()
def measured_costs(model, energies, held_out):
    """For every (layer, kind, i, j) what it costs that the pair shares a head, in nats a token: a dictionary of columns.

    `rise` of the LM loss, with its `standard_error` over blocks, and the `divergence` from the source's predictions.
    """
    inputs, reference = layer_inputs(model, held_out), list(log_probabilities(model, held_out))
    base = block_losses(reference, held_out[:, 1:])
    heads = model.config.num_key_value_heads
    costs = {}
    cases = product(range(len(energies)), KINDS, combinations(range(heads), 2))
    for index, kind, (i, j) in tqdm(list(cases), "pairs"):
        groups = [[i, j], *([head] for head in range(heads) if head not in (i, j))]
        alone = [[head] for head in range(heads)]
        pair = (groups, alone) if kind == "key" else (alone, groups)
        with shared_in_place(model.config, model.model.layers[index], *pair, energies[index]):
            fused = [predictions(model, index, states[None], every=1)[0] for states in inputs[index]]
        rises = block_losses(fused, held_out[:, 1:]) - base
        costs[index, kind, i, j] = {
            "rise": rises.mean().item(),
            "standard_error": (rises.std() / len(rises) ** 0.5).item(),
            "divergence": mean_divergence(fused, reference).item(),
        }
    return costs


def main():
    arguments = parse_arguments()
    name = Path(arguments.model).name
    model, tokenizer = load_checkpoint(arguments.model)
    calibration, training = (
        token_blocks(tokenizer, load_text(arguments.text, "train"), arguments.length, limit)
        for limit in (arguments.blocks, None)
    )
    fitted, held_out = calibration[0::2], calibration[1::2]
    history = search_scores(
        model,
        training,
        arguments.search_steps,
        arguments.length,
        seed=arguments.seed,
        output_dir=ROOT / "runs" / "similarity" / name,
    )
    measures = {metric: head_similarity(model, fitted, metric) for metric in ("weight_cka", "activation_cka", "spectral")}
    measures |= {
        "cosine": cosine(model),
        "omega": omega_similarity(history[max(history)], model.config.num_key_value_heads),
    }
    energies = head_energies(model, fitted)
    lost = {"key": [layer.key_cost for layer in energies], "value": [layer.value_cost for layer in energies]}
    rows = [
        {"layer": layer, "kind": kind, "i": i, "j": j}
        | {metric: values[kind][layer, i, j].item() for metric, values in measures.items()}
        | {"energy_lost": lost[kind][layer]((i, j))[0]}
        | cost
        | {"tokens": scored_tokens(held_out), "text": arguments.text}
        for (layer, kind, i, j), cost in measured_costs(model, energies, held_out).items()
    ]
    write_whole(arguments.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
