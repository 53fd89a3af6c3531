"""Perplexity while a fused model recovers, from the mean-pooled and the spectral start, with the source as control.

    python benchmarks/recovery.py                            # smollm2-135m at 50 %, 40,960 tokens of distillation
    python benchmarks/recovery.py --losses lm distil --starts spectral mean source

All runs see the same training blocks in the order of the seed. A run resumes from its checkpoints, and runs that the CSV
already has are not repeated.
"""

import argparse
import time
from pathlib import Path

from dha_utils import fuse, load_checkpoint, load_text, plan_heads, pretrain, token_blocks
from dha_utils.allocation import heads_for_budget, uniform_plan
from dha_utils.evaluation import scored_tokens
from dha_utils.runs import ROOT, append_rows, has_row
from dha_utils.training import training_log

HERE = Path(__file__).parent


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--starts", nargs="+", choices=("spectral", "mean", "source"), default=["spectral"])
    parser.add_argument("--losses", nargs="+", choices=("distil", "lm"), default=["distil"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=8)
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, help="default: results/recovery_MODEL.csv beside this script")
    return parser.parse_args()


def start_model(start, source, calibration, budget):
    if start == "source":
        return source
    if start == "spectral":
        return fuse(source, plan_heads(source, calibration, budget), calibration)
    return fuse(source, uniform_plan(source.config, heads_for_budget(source.config, budget)), method="mean")


def planned_runs(arguments):
    """One dictionary for each training run that the arguments ask for, with the columns that name it in the CSV."""
    for start in arguments.starts:
        for loss in arguments.losses if start != "source" else ["lm"]:
            for seed in arguments.seeds:
                budget = arguments.budget if start != "source" else 1.0
                yield {"start": start, "loss": loss, "budget": budget, "seed": seed, "total_tokens": arguments.tokens}


def main():
    arguments = parse_arguments()
    name = Path(arguments.model).name
    out = arguments.out or HERE / "results" / f"recovery_{name}.csv"
    source, tokenizer = load_checkpoint(arguments.model)
    calibration, validation, training = (
        token_blocks(tokenizer, load_text("wikipedia", split), arguments.length, limit)
        for split, limit in (
            ("calibration", arguments.calibration_blocks),
            ("validation", arguments.validation_blocks),
            ("train", None),
        )
    )
    models = {}
    for run in planned_runs(arguments):
        if has_row(out, run):
            continue
        start = run["start"]
        if start not in models:
            models[start] = start_model(start, source, calibration, arguments.budget)
        folder = ROOT / "runs" / "recovery" / "-".join(map(str, [name, *run.values()]))
        begin = time.perf_counter()
        pretrain(
            models[start],
            training,
            arguments.tokens,
            source if run["loss"] == "distil" else None,
            learning_rate=arguments.learning_rate,
            seed=run["seed"],
            validation=validation,
            output_dir=folder,
        )
        rows = (
            training_log(folder)[["tokens", "perplexity"]]
            .round(4)
            .assign(
                model=arguments.model,
                **run,
                learning_rate=arguments.learning_rate,
                validation_tokens=scored_tokens(validation),
                seconds=round(time.perf_counter() - begin),
            )
        )
        append_rows(out, rows)


if __name__ == "__main__":
    main()
