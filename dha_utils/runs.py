"""Run folders (`runs/NAME/`): what one notebook leaves for the next, and the table at the end.

python -m dha_utils.runs runs/NAME      # print the table
"""

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
    path = ROOT / run_dir
    record = path / "run.json"
    if record.is_file():
        stored = json.loads(record.read_text())
        changed = [name for name in settings if stored.get(name) != settings[name]]
        if changed:
            differences = ", ".join(f"{name} {stored.get(name)!r}, not {settings[name]!r}" for name in changed)
            raise ValueError(f"{run_dir} holds a run with {differences}: choose another run_dir, or delete that folder")
    elif path.is_dir() and any(entry.suffix != ".ipynb" for entry in path.iterdir()):
        raise ValueError(f"{run_dir} is a folder of something else than a run: choose another run_dir")
    else:
        write_whole(record, json.dumps(settings))
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


def main():
    if len(sys.argv) != 2 or not (path := Path(sys.argv[1]) / "metrics.csv").is_file():
        sys.exit("usage: python -m dha_utils.runs RUN_DIR, a folder with metrics.csv: run notebooks 01 to 05 first")
    print(pd.read_csv(path).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
