"""What `make run` does before the first notebook and after the last.

python -m dha_utils check --model smollm2-135m --run-dir runs/NAME     # one sentence if something is wrong
python -m dha_utils table --run-dir runs/NAME
"""

import argparse
import sys

import pandas as pd

from .allocation import heads_for_budget
from .checkpoints import load_checkpoint
from .runs import ROOT, check_run, require
from .statistics import check_source
from .text import SPLITS, load_text, token_blocks


def check(model, text, budget, length, run_dir):
    """Fetch the model, and look at everything that could go wrong before the first notebook: hours may follow."""
    check_run(run_dir, model=model, text=text, budget=budget, length=length)
    source, tokenizer = load_checkpoint(model)
    check_source(source.config)
    heads_for_budget(source.config, budget)
    for split in SPLITS:
        token_blocks(tokenizer, load_text(text, split), length)


def main(command_line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "table"))
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--model", default="wiki-mha")
    parser.add_argument("--text", default="wikipedia")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    arguments = parser.parse_args(command_line)
    try:
        if arguments.action == "check":
            check(arguments.model, arguments.text, arguments.budget, arguments.length, arguments.run_dir)
        else:
            metrics = require(ROOT / arguments.run_dir, "metrics.csv", "notebooks 01 to 05")
            print(pd.read_csv(metrics).round(3).to_string(index=False, na_rep=""))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
