"""Perplexity while a fused model recovers: from several starts, on two losses, by several sets of weights.

    python benchmarks/recovery.py                            # smollm2-135m at 50 %, 40,960 tokens of distillation
    python benchmarks/recovery.py --starts spectral mean source --losses lm distil
    python benchmarks/recovery.py --starts refitted --trainable attention lora all
    python benchmarks/recovery.py --model wiki-mha --length 256 --budget 0.25 --tokens 102400 --seeds 0 1 2 \
        --calibration-blocks 64 --validation-blocks 64

All runs see the same training blocks in the order of the seed, and the source is trained on them as the control. A run
resumes from its checkpoints, and runs that the CSV already has are not repeated.
"""

import argparse
import time
from itertools import product
from pathlib import Path

from dha_utils import fuse, load_checkpoint, load_text, plan_heads, pretrain, token_blocks
from dha_utils.allocation import heads_for_budget, uniform_plan
from dha_utils.evaluation import scored_tokens
from dha_utils.pretraining import TRAINABLE
from dha_utils.refit import refit
from dha_utils.runs import ROOT, append_rows, has_row
from dha_utils.training import training_log

HERE = Path(__file__).parent
STARTS = ("refitted", "spectral", "mean", "source")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["spectral"])
    parser.add_argument("--losses", nargs="+", choices=("distil", "lm"), default=["distil"])
    parser.add_argument("--trainable", nargs="+", choices=TRAINABLE, default=["attention"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="adapters get ten times as much")
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=32)
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--out", type=Path, help="default: results/recovery_MODEL.csv beside this script")
    return parser.parse_args()


def start_model(start, source, calibration, budget):
    if start == "source":
        return source
    if start in ("spectral", "refitted"):
        fused = fuse(source, plan_heads(source, calibration, budget), calibration)
        return fused if start == "spectral" else refit(fused, source, calibration)[0]
    return fuse(source, uniform_plan(source.config, heads_for_budget(source.config, budget)), method="mean")


def planned_runs(arguments):
    """One dictionary for each training run that the arguments ask for, with the columns that name it in the CSV."""
    for start, loss, trainable, seed in product(arguments.starts, arguments.losses, arguments.trainable, arguments.seeds):
        if start == "source" and loss == "distil":
            continue  # it would learn from itself
        yield {
            "start": start,
            "loss": loss,
            "trainable": trainable,
            "budget": arguments.budget if start != "source" else 1.0,
            "seed": seed,
            "total_tokens": arguments.tokens,
            "learning_rate": arguments.learning_rate * (10 if trainable == "lora" else 1),
        }


def main():
    arguments = parse_arguments()
    name = Path(arguments.model).name
    out = arguments.out or HERE / "results" / f"recovery_{name}.csv"
    source, tokenizer = load_checkpoint(arguments.model)
    calibration, validation, training = (
        token_blocks(tokenizer, load_text("wikipedia", split), arguments.length, limit)
        for split, limit in (
            ("train", arguments.calibration_blocks),
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
            trainable=run["trainable"],
            learning_rate=run["learning_rate"],
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
                validation_tokens=scored_tokens(validation),
                seconds=round(time.perf_counter() - begin),
            )
        )
        append_rows(out, rows)


if __name__ == "__main__":
    main()
