"""Run folders (`runs/NAME/`): what one notebook leaves for the next, the check before the first, the table at the end.

python -m dha_utils.runs check --model smollm2-135m --run-dir runs/NAME     # one sentence if something is wrong
python -m dha_utils.runs table --run-dir runs/NAME
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]


def open_run(run_dir, **settings):
    """The run folder, made if need be, as a `Path`; a relative one lies in the repository, wherever the notebook runs.

    `settings` (model, text, budget, …) are what all notebooks of the run share.

    Raises ValueError if the folder holds a run with other settings, or other things than a run.
    """
    path = check_run(run_dir, **settings)
    if not (path / "run.json").is_file():
        write_whole(path / "run.json", json.dumps(settings))
    return path


def check_run(run_dir, **settings):
    """What `open_run` refuses, without making anything."""
    path = ROOT / run_dir
    if (path / "run.json").is_file():
        stored = json.loads((path / "run.json").read_text())
        changed = [name for name in settings if stored.get(name) != settings[name]]
        if changed:
            differences = ", ".join(f"{name} {stored.get(name)!r}, not {settings[name]!r}" for name in changed)
            raise ValueError(f"{run_dir} holds a run with {differences}: choose another run_dir, or delete that folder")
    elif path.is_dir() and any(entry.suffix != ".ipynb" for entry in path.iterdir()):
        raise ValueError(f"{run_dir} is a folder of something else than a run: choose another run_dir")
    return path


def require(run, name, notebook):
    """The path of what an earlier notebook left in the run folder.

    Raises ValueError that says which notebook to run first.
    """
    if not (run / name).exists():
        raise ValueError(f"there is no {name} in {run}: run {notebook} first, with the same run_dir")
    return run / name


def write_whole(path, text):
    """Write a text file at once: an interruption leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def save_model(model, tokenizer, path):
    """`save_pretrained` of both into a folder that appears whole, in the place of an older one."""
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def record_metrics(run, stage, rows):
    """Put `rows` (dictionaries) into metrics.csv as those of one stage, in the place of its earlier ones."""
    path = run / "metrics.csv"
    new = pd.DataFrame(rows)
    new.insert(0, "stage", stage)
    if path.exists():
        old = pd.read_csv(path)
        new = pd.concat([old[old["stage"] != stage], new])
    write_whole(path, new.to_csv(index=False))


def check(model, text, budget, length, run_dir):
    """Fetch the model, and look at everything that could go wrong before the first notebook: hours may follow."""
    from .allocation import heads_for_budget
    from .checkpoints import load_checkpoint
    from .text import SPLITS, load_text, token_blocks

    check_run(run_dir, model=model, text=text, budget=budget, length=length)
    source, tokenizer = load_checkpoint(model)
    if source.config.model_type != "llama":
        raise ValueError(f"{model!r} is a DHA model already: give the LLaMA checkpoint that it was made from")
    heads_for_budget(source.config, budget)
    for split in SPLITS:
        token_blocks(tokenizer, load_text(text, split), length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("check", "table"))
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--model", default="wiki-mha")
    parser.add_argument("--text", default="wikipedia")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    arguments = parser.parse_args()
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
