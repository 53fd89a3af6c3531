"""The seconds to the first token: source, GQA, DHA and a low-rank cache of the same size, over the length of the prompt.

    python benchmarks/prefill.py                                                         # a CPU, float32, two cores
    python benchmarks/prefill.py --device cuda --dtype bfloat16 --lengths 2048 8192 32768

One decoder layer of each shape reads the whole prompt into an empty cache. Weights and tokens are random. All are timed in
turn in one process; cases that the CSV has are not timed again.
"""

import argparse
from functools import partial
from itertools import product

import torch
from speed import add_arguments, listed, low_rank_versions, measure, shape_config, versions
from transformers import DynamicCache


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "prefill")
    parser.add_argument("--shapes", nargs="+", default=["SmolLM2-135M", "LLaMA-2-7B", "Llama-3-8B"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    return parser.parse_args()


def first_token(model, length):
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device)
    return lambda: model.model(tokens, past_key_values=DynamicCache(config=model.config))


def steps(arguments, shape, length):
    config = shape_config(shape, num_hidden_layers=1, vocab_size=32)
    made = (arguments.budgets, arguments.device, arguments.dtype)
    models = versions(config, *made) | low_rank_versions(config, *made)
    return {name: (first_token(make(), length), {}) for name, make in models.items()}


def main():
    arguments = parse_arguments()
    for shape, length in product(arguments.shapes, arguments.lengths):
        case = {"shape": shape, "layers": 1, "budgets": listed(arguments.budgets), "length": length}
        measure(arguments, case, partial(steps, arguments, shape, length))


if __name__ == "__main__":
    main()
