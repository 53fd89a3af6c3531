"""Perplexity after fusion without any training, over budgets, methods and calibration draws, beside low-rank caches.

    python benchmarks/training_free.py --refit layers                                # smollm2-135m, 16,384 tokens
    python benchmarks/training_free.py --refit layers --calibration-blocks 128
    python benchmarks/training_free.py --model austen-mha --length 256 --calibration-blocks 128 \
        --validation-blocks 64 --budgets 0.5 0.25 0.125 --refit layers

Every row stands for one model: the same validation blocks for all, calibration blocks drawn by the seed from the training
split, whose articles are many: what is fitted to a few of them serves the others badly. Rows that the CSV already has are
not measured again, so an interrupted run resumes, and processes with other seeds may run beside it.
"""

import argparse
import time
from dataclasses import replace
from functools import cache, partial
from itertools import product

from inputs import add_inputs, parsed, source_and_text
from low_rank import allocated_ranks, low_rank_model, uniform_ranks, whitened_svd
from tqdm import tqdm

from dha_utils import fuse, perplexity
from dha_utils.fuse.refit import refit
from dha_utils.measure.energies import head_energies
from dha_utils.measure.moments import collect_moments
from dha_utils.measure.perplexity import scored_tokens
from dha_utils.plan.allocate import heads_for_budget, knapsack, uniform_plan
from dha_utils.plan.partition import group_heads, partition_costs, plan_of_counts
from dha_utils.plan.prices import after_refit, loss_increase
from dha_utils.runs import append_rows, has_row
from dha_utils.sources.text import drawn

REFITS = {"attention": {"layer_epochs": 0}, "layers": {}}  # what is fitted: settings of `refit`


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "smollm2-135m", "training_free")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2 / 3, 0.5, 1 / 3])
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=32)
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--refit", nargs="+", choices=list(REFITS), default=[], help="also fit to the source")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration draws")
    return parsed(parser)


def methods(source, calibration, refits):
    """{(method, allocation): function of the number of heads that makes the model}; what they share is made once."""

    @cache
    def moments():
        return collect_moments(source, calibration)

    @cache
    def energies():
        return head_energies(source, calibration, moments=moments())

    @cache
    def partitions():
        return group_heads(source, calibration, energies=energies())

    @cache
    def prices(allocation):
        if allocation == "refit":
            return after_refit(prices("loss"))
        return (
            partition_costs(partitions()) if allocation == "cost" else loss_increase(source, calibration, alone="measured")
        )

    def standard_planes(heads):
        standard = [replace(layer, free_frequencies=False) for layer in energies()]
        return fuse(source, uniform_plan(source.config, heads), energies=standard)

    @cache
    def svd():
        return whitened_svd(source, moments())

    def low_rank(ranks_of, heads):
        return low_rank_model(source, svd(), ranks_of(heads))

    def uniform(heads):
        return uniform_ranks(source, heads / heads_for_budget(source.config, 1))

    def allocated(allocation, heads):
        return fuse(source, plan_of_counts(partitions(), knapsack(prices(allocation), heads)), energies=energies())

    def refitted(part, make, heads):
        return refit(make(heads), source, calibration, **REFITS[part])[0]

    made = {
        ("mean", "uniform"): lambda heads: fuse(source, uniform_plan(source.config, heads), method="mean"),
        ("spectral, standard planes", "uniform"): standard_planes,
        ("spectral", "uniform"): lambda heads: fuse(source, uniform_plan(source.config, heads), energies=energies()),
        ("spectral", "cost"): partial(allocated, "cost"),
        ("spectral", "loss"): partial(allocated, "loss"),
        ("low rank", "uniform"): partial(low_rank, uniform),
        ("low rank", "cost"): partial(low_rank, lambda heads: allocated_ranks(svd(), uniform(heads))),
        ("spectral", "refit"): partial(allocated, "refit"),
    }
    for part in refits:
        made[f"spectral, {part} refitted", "refit"] = partial(refitted, part, partial(allocated, "refit"))
        made[f"low rank, {part} refitted", "uniform"] = partial(refitted, part, partial(low_rank, uniform))
    return made


def head_counts(model):
    """What a row says of the plan; a low-rank model has none."""
    counts = getattr(model.config, "head_counts", list)()
    return {f"{kind}_heads": sum(count[i] for count in counts) or None for i, kind in enumerate(("key", "value"))}


def main():
    arguments = parse_arguments()
    source, _, pool, validation = source_and_text(arguments)
    base = perplexity(source, validation)
    for seed in tqdm(arguments.seeds, "calibration draws"):
        calibration = drawn(pool, arguments.calibration_blocks, seed)
        made = methods(source, calibration, arguments.refit)
        for budget, ((method, allocation), make) in product(arguments.budgets, made.items()):
            run = {
                "method": method,
                "allocation": allocation,
                "budget": round(budget, 4),
                "seed": seed,
                "text": arguments.text,
            }
            run |= {"calibration_tokens": calibration.numel(), "validation_tokens": scored_tokens(validation)}
            if has_row(arguments.out, run):
                continue
            start = time.perf_counter()
            model = make(heads_for_budget(source.config, budget))
            seconds = time.perf_counter() - start
            result = perplexity(model, validation)
            measured = {"perplexity": result, "base_perplexity": base, "ratio": result / base}
            measured["seconds"] = seconds
            append_rows(arguments.out, [{"model": arguments.model, **run, **head_counts(model), **measured}])


if __name__ == "__main__":
    main()
