"""Perplexity while a fused and refitted model recovers: on two losses, by several sets of weights.

    python benchmarks/recovery.py --seeds 0 1 2 --losses distil lm             # smollm2-135m at 50 %
    python benchmarks/recovery.py --seeds 0 1 2 --starts source --losses lm    # its control

Those of austen-mha, with --model austen-mha --length 256 --calibration-blocks 128 --validation-blocks 64
--seeds 0 1 2 --learning-rate 5e-4 and each of

    --budget 0.25 --trainable attention all
    --budget 0.25 --losses lm
    --starts source --losses lm --trainable attention all

On a GPU, --device cuda --tokens 512000 --seeds 0 1 2 with each of

    --budget 0.5
    --budget 0.3333333333333333
    --starts source --losses lm

and, in two hours of one core a seed, --budget 0.3333333333333333 --losses lm --tokens 512000 --seeds 0 1 2.

The rows with the device cuda are an H200's, other runs beside them, which makes their seconds long; the starts were made
in float32, the training was in TF32 (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1).

The seed draws the blocks that calibrate a start and orders the training blocks, the same for all runs; the source is
trained on them as the control. A start is made once and kept in runs/recovery, a run resumes from its checkpoints, and
those that the CSV already has are not repeated. What was resumed has no seconds.
"""

import argparse
import time
from itertools import product
from pathlib import Path

from inputs import add_inputs, parsed, source_and_text

from dha_utils import fuse, load_checkpoint, plan_heads, pretrain, repeat_passages
from dha_utils.fuse.refit import refit
from dha_utils.measure.perplexity import scored_tokens
from dha_utils.recover.pretrain import TRAINABLE
from dha_utils.recover.training import training_log
from dha_utils.runs import ROOT, append_rows, fingerprint, has_row
from dha_utils.sources.checkpoints import save_checkpoint
from dha_utils.sources.text import drawn

RUNS = ROOT / "runs" / "recovery"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_inputs(parser, "smollm2-135m", "recovery")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=102400)
    parser.add_argument("--starts", nargs="+", choices=("refitted", "source"), default=["refitted"])
    parser.add_argument("--losses", nargs="+", choices=("distil", "lm"), default=["distil"])
    parser.add_argument("--trainable", nargs="+", choices=TRAINABLE, default=["attention"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="adapters get ten times as much")
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--calibration-blocks", type=int, default=128)
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    return parsed(parser)


def refitted_start(arguments, source, tokenizer, training, budget, seed=0, repeated=0):
    """The refitted model at a budget, its calibration drawn from `training` by the seed; made once, kept in `RUNS`.

    `repeated`: the share of the calibration blocks that say a passage twice.
    """
    calibration = repeat_passages(drawn(training, arguments.calibration_blocks, seed), repeated)
    made_from = (Path(arguments.model).name, arguments.text, "refitted", budget, calibration.numel(), seed)
    folder = RUNS / "-".join([*map(str, made_from), fingerprint(source, calibration)])
    if not folder.exists():
        fused = fuse(source, plan_heads(source, calibration, budget), calibration)
        save_checkpoint(refit(fused, source, calibration)[0], tokenizer, folder)
    return load_checkpoint(folder, device=source.device)[0]


def planned_runs(arguments):
    """One dictionary for each training run that the arguments ask for, with the columns that name it in the CSV."""
    for start, loss, trainable, seed in product(arguments.starts, arguments.losses, arguments.trainable, arguments.seeds):
        if start == "source" and loss == "distil":
            continue  # it would learn from itself
        yield {
            "model": Path(arguments.model).name,
            "text": arguments.text,
            "start": start,
            "loss": loss,
            "trainable": trainable,
            "budget": arguments.budget if start != "source" else 1.0,
            "calibration_tokens": arguments.calibration_blocks * arguments.length if start != "source" else 0,
            "seed": seed,
            "total_tokens": arguments.tokens,
            "learning_rate": arguments.learning_rate * (10 if trainable == "lora" else 1),
        }


def main():
    arguments = parse_arguments()
    source, tokenizer, training, validation = source_and_text(arguments, arguments.device)
    scored = {"validation_tokens": scored_tokens(validation)}
    for run in planned_runs(arguments):
        if has_row(arguments.out, run | scored):
            continue
        start = source
        if run["start"] != "source":
            start = refitted_start(arguments, source, tokenizer, training, run["budget"], run["seed"])
        folder = RUNS / "-".join(map(str, run.values()))
        resumed, begin = folder.exists(), time.perf_counter()
        pretrain(
            start,
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
                **run,
                **scored,
                device=source.device.type,
                seconds=None if resumed else round(time.perf_counter() - begin),
            )
        )
        append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
