"""Run folders (`runs/NAME/`): what one notebook leaves for the next."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ".6g"  # of the numbers in the CSVs


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


def read_rows(path):
    """The table of a CSV, empty if there is none yet."""
    return pd.read_csv(path) if Path(path).exists() else pd.DataFrame()


def rows_with(path, values):
    """The rows of a CSV with these values, {column: value}, as `append_rows` writes them."""
    rows = read_rows(path)
    written = {name: float(f"{value:{DIGITS}}") if isinstance(value, float) else value for name, value in values.items()}
    return rows[(rows[list(values)] == pd.Series(written)).all(axis=1)] if len(rows) else rows


def has_row(path, values):
    """Whether `rows_with` finds any."""
    return len(rows_with(path, values)) > 0


def append_rows(path, rows):
    """Add `rows` (dictionaries) to a CSV to which other processes may be adding theirs."""
    with FileLock(f"{path}.lock"):
        table = pd.concat([read_rows(path), pd.DataFrame(rows)]).infer_objects()  # what is missing keeps numbers numbers
        write_whole(path, table.to_csv(index=False, float_format=f"%{DIGITS}"))


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
