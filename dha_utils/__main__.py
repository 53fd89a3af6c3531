"""Convert a checkpoint; and the commands of `make run` before the first notebook and after the last.

python -m dha_utils convert --model smollm2-135m --budget 0.5 --out my-dha     # a layer at a time, for any size
python -m dha_utils check -p model smollm2-135m -p run_dir runs/NAME           # one sentence if something is wrong
python -m dha_utils table --run-dir runs/NAME
python -m dha_utils monitor --baseline runs/NAME/baseline.json --model my-dha --text new.txt   # exits with 1 on drift

`check` takes the parameters of the notebooks as papermill does, and those that are not given from the notebooks.
"""

import argparse
import sys

import yaml

from .compare.monitor import check_drift, fresh_blocks, read_baseline
from .convert import convert
from .parameters import check_parameters, load_inputs, text_blocks
from .plan.head_plan import HeadPlan
from .runs import ROOT, read_metrics
from .sources.checkpoints import find_checkpoint, load_checkpoint, load_tokenizer
from .sources.precision import DTYPES, pick_device
from .sources.text import load_text

# of the notebooks, where a command does not say
DEFAULTS = {
    "run_dir": "runs/tutorial",
    "model": "austen-mha",
    "text": "austen",
    "budget": 0.25,
    "method": "spectral",
    "seed": 0,
    "device": None,
    "dtype": None,
    "length": 256,
    "calibration_blocks": 48,
    "repeated": 0.0,
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


def add_convert(actions):
    """The options of `convert`, named as the parameters of the notebooks are."""
    parser = actions.add_parser("convert", help="make a DHA checkpoint of a LLaMA checkpoint, one layer at a time")
    parser.add_argument("--model", required=True, help="a folder, a name on the hub, austen-mha or smollm2-135m")
    parser.add_argument("--out", required=True, help="the folder of the checkpoint that is made")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--budget", type=float, help="share of the key and value heads to keep, at most 1")
    target.add_argument("--cache-bytes", type=int, help="the most bytes of KV cache per token")
    target.add_argument("--max-increase", type=float, help="the largest increase of perplexity before refit, 0.05 for 5 %%")
    target.add_argument("--plan", metavar="plan.json", help="the heads that share, as notebook 02 leaves them in a run")
    parser.add_argument("--text", default="wikipedia", help="a file, a folder or a hub data set (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights that are written; by default the checkpoint's own")
    parser.add_argument("--device", help="by default CUDA or MPS if there is one")
    parser.add_argument("--length", type=int, default=512, help="tokens per block (default: %(default)s)")
    parser.add_argument("--calibration-blocks", type=int, default=32, help="to measure and fit on (default: %(default)s)")
    repeated = "share of them that say their first half twice: less of copying is lost (default: %(default)s)"
    parser.add_argument("--repeated", type=float, default=0.25, help=repeated)
    parser.add_argument("--validation-blocks", type=int, default=8, help="for the model card (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the blocks (default: %(default)s)")
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="fuse only: quicker, a higher perplexity")


def convert_checkpoint(
    action,
    model,
    out,
    text,
    length,
    calibration_blocks,
    repeated,
    validation_blocks,
    budget,
    cache_bytes,
    max_increase,
    plan,
    **options,
):
    blocks = {
        "length": length,
        "calibration_blocks": calibration_blocks,
        "repeated": repeated,
        "validation_blocks": validation_blocks,
    }
    target = {"budget": budget, "cache_bytes": cache_bytes, "max_increase": max_increase}
    check_parameters(**blocks, **{name: value for name, value in target.items() if value is not None})
    plan = plan and HeadPlan.load(plan)
    source, config = find_checkpoint(model)
    texts = {split: load_text(text, split) for split in ("train", "validation")}
    calibration, validation = text_blocks(model, config, load_tokenizer(model, source, config), texts, **blocks)
    print(convert(model, calibration, out, validation=validation, text=text, plan=plan, **target, **options))


def add_monitor(actions):
    parser = actions.add_parser("monitor", help="measure a model again, beside the baseline that notebook 06 left")
    parser.add_argument("--baseline", required=True, metavar="baseline.json")
    parser.add_argument("--model", required=True, help="the folder of the checkpoint in use")
    parser.add_argument("--text", required=True, help="of the kind that the baseline was measured on: a file or a folder")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks that are drawn from the text")
    parser.add_argument("--device", help="by default CUDA or MPS if there is one")


def monitor(action, baseline, model, text, seed, device):
    """Prints the table; whether there is drift."""
    expected = read_baseline(baseline)
    loaded, tokenizer = load_checkpoint(model, expected["dtype"], pick_device(device))
    blocks = fresh_blocks(tokenizer, text, expected["length"], expected["blocks"], seed)
    table = check_drift(expected, loaded, blocks)
    print(table.round(4).to_string())
    for name, row in table[table["drift"]].iterrows():
        what = expected["metrics"][name]["what"]
        print(f"drift: {name} ({what}) is {row['now']:.4g}, above its limit of {row['limit']:.4g}")
    return bool(table["drift"].any())


def checked(arguments):
    """The exit status of `monitor`: 1 is drift and nothing else, 2 that it could not be measured."""
    try:
        return int(monitor(**vars(arguments)))
    except Exception as error:
        print(f"error: {error}" if isinstance(error, ValueError) else f"error: {error!r}", file=sys.stderr)
        return 2


def main(command_line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    add_convert(actions)
    add_monitor(actions)
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
        elif arguments.action == "convert":
            convert_checkpoint(**vars(arguments))
        elif arguments.action == "monitor":
            sys.exit(checked(arguments))
        else:
            print(read_metrics(ROOT / arguments.run_dir).round(3).to_string(index=False, na_rep=""))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
