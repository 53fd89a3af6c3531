"""The commands of `make run` before the first notebook and after the last.

python -m dha_utils check -p model smollm2-135m -p run_dir runs/NAME    # one sentence if something is wrong
python -m dha_utils table --run-dir runs/NAME

`check` takes the parameters of the notebooks as papermill does, and those that are not given from the notebooks.
"""

import argparse
import sys

import yaml

from .parameters import load_inputs
from .runs import ROOT, read_metrics

# of the notebooks, where a command does not say
DEFAULTS = {
    "run_dir": "runs/tutorial",
    "model": "wiki-mha",
    "text": "wikipedia",
    "budget": 0.25,
    "method": "spectral",
    "seed": 0,
    "length": 256,
    "calibration_blocks": 48,
    "validation_blocks": 32,
}


def typed(word):
    """A word of a command line as papermill's -p reads it: a number where it can be one."""
    if word in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def main(command_line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check", help="fetch the model, and look at everything that could go wrong later")
    check.add_argument("-p", dest="typed", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    check.add_argument("-r", dest="raw", nargs=2, action="append", default=[], metavar=("NAME", "TEXT"))
    check.add_argument("-y", dest="yaml", action="append", default=[], metavar="YAML")
    table = actions.add_parser("table", help="print the measurements of the notebooks of a run")
    table.add_argument("--run-dir", required=True)
    arguments = parser.parse_args(command_line)
    try:
        if arguments.action == "check":
            given = {name: typed(word) for name, word in arguments.typed} | dict(arguments.raw)
            for text in arguments.yaml:
                given |= yaml.safe_load(text)
            load_inputs(**DEFAULTS | given)
        else:
            print(read_metrics(ROOT / arguments.run_dir).round(3).to_string(index=False, na_rep=""))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
