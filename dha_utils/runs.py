"""Run folders (`runs/NAME/`): the files that one notebook leaves for the next, written whole, known by content."""

import hashlib
import json
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ".6g"  # of the numbers in the CSVs
MEASURED_BY = {"source": "01_head_redundancy", "trained": "04_continued_pretraining"}
MEASURED_BY |= dict.fromkeys(("untrained", "learned"), "03_head_fusion")
MADE_BY = {"model": "03_head_fusion", "recovered": "04_continued_pretraining"}
NO_CONTENT = ("_name_or_path", "transformers_version", "use_cache")  # of a config
AGAIN = " (make run does so once its .ipynb is deleted from the run folder)"


def find(name):
    """The path of a file or folder, there or not: a relative one as seen from here, or else from the repository."""
    path = expand(name)
    return path if path.exists() else ROOT / path


def expand(name):
    """A path with ~ for a home folder written out."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no {name}: {error}") from error


def check_run(run_dir, **settings):
    """The run folder as a `Path`, there or not; a relative one lies in the repository, wherever the notebook runs.

    `settings` (model, text, budget, …) are those that all notebooks of the run share.

    Raises ValueError if the folder holds a run with other settings, or other things than a run.
    """
    path = ROOT / expand(run_dir)
    if (path / "run.json").is_file():
        stored = _read_json(path / "run.json")
        changed = [name for name in settings if stored.get(name) != settings[name]]
        if changed:
            said = {name: f"{name} {stored.get(name)!r}, not {settings[name]!r}" for name in changed}
            said |= {name: f"a {name[:5].strip('_')} of other content" for name in changed if name.endswith("_content")}
            differences = ", ".join(said.values())
            raise ValueError(
                f"{run_dir} holds a run with {differences}: choose another run_dir (make: RUN=NAME), or delete that folder"
            )
    elif path.is_dir() and any(entry.suffix != ".ipynb" and entry.name[0] != "." for entry in path.iterdir()):
        raise ValueError(f"{run_dir} is a folder of something else than a run: choose another run_dir")
    return path


def write_run(run_dir, settings):
    """Make the run folder, if need be, and leave its settings there."""
    path = check_run(run_dir, **settings)
    if not (path / "run.json").is_file():
        write_whole(path / "run.json", json.dumps(settings, indent=1))
    return path


def leave(run, name, *made_from):
    """Note that the file or folder `name` of a run has just been made from these other files of it."""
    made = _made(run) | {name: {file: _content(run / file) for file in ("run.json", *made_from)}}
    write_whole(run / "made.json", json.dumps(made, indent=1))


def require(run, name, notebook):
    """The path of a file or folder that an earlier notebook left in the run folder.

    Raises ValueError that says which notebook to run first, if it is missing, or made from files that have changed since.
    """
    if not (run / name).exists():
        raise ValueError(f"there is no {name} in {run}: run {notebook} first, with the same run_dir")
    if name not in _made(run):
        raise ValueError(f"{name} in {run} is not left by a finished notebook: run {notebook} again{AGAIN}")
    if changed := _changed(run, name):
        raise ValueError(f"{name} in {run} was made from another {changed}: run {notebook} again{AGAIN}")
    return run / name


def _made(run):
    return _read_json(run / "made.json") if (run / "made.json").is_file() else {}


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): delete that folder, or choose another run_dir") from error


def _changed(run, name):
    """The first of all that `name` was made from, however far back, that is not as it was."""
    for file, content in _made(run).get(name, {}).items():
        if _content(run / file) != content:
            return file
        if changed := _changed(run, file):
            return changed
    return None


def _content(path):
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    named = {file: str(file.relative_to(path.parent)) for file in files if file.is_file()}
    return content({file: name for file, name in named.items() if not any(p[0] == "." for p in name.split("/"))})


def content(names):
    """Twelve digits that name files, {path: name}, by their names and contents."""
    digest = hashlib.sha256()
    for file, name in names.items():
        digest.update(name.encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


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
    return rows[(rows.reindex(columns=list(values)) == pd.Series(written)).all(axis=1)] if len(rows) else rows


def has_row(path, values):
    """Whether `rows_with` finds any."""
    return len(rows_with(path, values)) > 0


@contextmanager
def spending(run, step, tokens):
    """Notes in cost.csv what the block under `with` took: tokens, seconds, peak memory of this process until then (GiB)."""
    start = time.perf_counter()
    yield
    took = {"step": step, "tokens": tokens, "seconds": time.perf_counter() - start, "peak (GiB)": peak_gib()}
    rows = read_rows(run / "cost.csv")
    rows = rows[rows["step"] != step] if len(rows) else rows
    write_whole(run / "cost.csv", pd.concat([rows, pd.DataFrame([took])]).to_csv(index=False, float_format=f"%{DIGITS}"))


def spent_on(run, checkpoint):
    """The rows of cost.csv that led to `model` or `recovered` of the run; none for a model that was made elsewhere."""
    rows = read_rows(run / "cost.csv").reindex(columns=["step", "tokens", "seconds", "peak (GiB)"])
    trained, recovered = rows["step"].astype(str).str.startswith("train"), rows["step"] == "train: repaired, distilled"
    return rows[~trained | recovered & (checkpoint == "recovered")] if checkpoint in MADE_BY else rows[:0]


def peak_gib():
    """GiB of memory that this process had at most, with a GPU that of its allocator; not a number on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins at the parent's peak
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def append_rows(path, rows):
    """Add `rows` (dictionaries) to a CSV to which other processes may be adding theirs."""
    with FileLock(f"{path}.lock"):
        table = pd.concat([read_rows(path), pd.DataFrame(rows)]).infer_objects()  # columns with gaps keep numbers numbers
        write_whole(path, table.to_csv(index=False, float_format=f"%{DIGITS}"))


def record_metrics(run, stage, rows, *made_from):
    """Put `rows` (dictionaries) into metrics.csv as those of one stage, in the place of its earlier ones.

    `made_from`: the files of the run that they were measured on, as `leave` takes them.
    """
    path = run / "metrics.csv"
    new = pd.DataFrame(rows)
    new.insert(0, "stage", stage)
    if path.exists():
        old = pd.read_csv(path)
        new = pd.concat([old[old["stage"] != stage], new])
    write_whole(path, new.to_csv(index=False))
    leave(run, f"metrics.csv ({stage})", *made_from)
    leave(run, "metrics.csv")


def read_metrics(run):
    """The table of metrics.csv. Raises ValueError if there is none, or files that a stage was measured on have changed."""
    table = pd.read_csv(require(run, "metrics.csv", "01_head_redundancy to 04_continued_pretraining"))
    for stage in table["stage"].unique():
        if changed := _changed(run, f"metrics.csv ({stage})"):  # the rows are written before that is noted
            raise ValueError(
                f"the {stage} rows of {run / 'metrics.csv'} were measured with another {changed}: run {MEASURED_BY[stage]} "
                f"again{AGAIN}"
            )
    return table


def fingerprint(*things):
    """Twelve digits that name models, tensors and values of JSON by their content.

    Weights count byte by byte: their sum would differ with the number of threads.
    """
    digest = hashlib.sha256()
    for thing in things:
        tensors, described = [], thing
        if isinstance(thing, torch.Tensor):
            tensors, described = [thing], None
        elif isinstance(thing, torch.nn.Module):
            tensors = list(thing.parameters())
            described = {name: value for name, value in thing.config.to_dict().items() if name not in NO_CONTENT}
        digest.update(json.dumps([described, [(str(t.dtype), t.shape) for t in tensors]], default=str).encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
