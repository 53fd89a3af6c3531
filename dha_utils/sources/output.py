"""The folder that a conversion writes: it grows beside its name, is resumed, and never replaces anything else."""

import json
import shutil

from safetensors import safe_open
from safetensors.torch import save_file

from ..runs import write_whole
from .precision import dtype_name

INDEX = "model.safetensors.index.json"


def is_finished(out, request, replace=False):
    """Whether `out` holds this very conversion.

    Raises ValueError if it holds anything else, but for another DHA checkpoint with `replace`.
    """
    take_back(out)
    record = out / "conversion.json"
    if record.is_file() and json.loads(record.read_text()).get("request") == as_json(request):
        return True
    if out.exists() and not (is_checkpoint(out, "dha") if replace else out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there and holds something else than this conversion: choose another folder")
    return False


def as_json(request):
    return json.loads(json.dumps(request))


def work_folder(out, request, replace=False):
    """The folder beside `out` in which the conversion grows.

    Raises ValueError if another one is unfinished there, unless it may be replaced.
    """
    work = out.with_name(f".{out.name}.converting")
    begun, whole = (work / name for name in ("request.json", "conversion.json"))
    if begun.is_file() or whole.is_file():
        stored = json.loads(whole.read_text())["request"] if whole.is_file() else json.loads(begun.read_text())
        request = as_json(request)
        changed = sorted(name for name in stored.keys() | request.keys() if stored.get(name) != request.get(name))
        if changed and not replace:
            raise ValueError(
                f"{work} holds an unfinished conversion with another {', '.join(changed)}: delete it, or choose another out"
            )
        if not changed:
            return work
    shutil.rmtree(work, ignore_errors=True)  # of another request, or of one that never began
    work.mkdir(parents=True)
    return work


def check_disk(work, model, dtype, streams):
    """Raises ValueError if the weights and `streams` numbers in float32 will not fit on the disk beside what is there."""
    needed = model.num_parameters() * dtype.itemsize + 2 * 4 * streams  # a file and the one that will replace it
    free = shutil.disk_usage(work).free + sum(file.stat().st_size for file in work.iterdir())
    if free < needed:
        raise ValueError(
            f"the conversion may take {needed / 1e9:.1f} GB of disk at {work.parent}, where {free / 1e9:.1f} GB are free"
        )


def write_weights(path, weights, dtype):
    """A safetensors file of `weights` {name: tensor} in `dtype`. Raises ValueError if one is not finite in it."""
    kept = {name: weight.detach().to(dtype).cpu().contiguous() for name, weight in weights.items()}
    for name, weight in kept.items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not finite in {dtype_name(dtype)}: choose float32 or bfloat16")
    partial = path.with_name(f".{path.name}.partial")
    save_file(kept, partial, {"format": "pt"})
    partial.replace(path)


def write_index(folder, names):
    """The index of the shards of these names in a folder, as transformers reads it."""
    files, total = {}, 0
    for name in names:
        with safe_open(folder / name, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), name)
        total += (folder / name).stat().st_size
    write_whole(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1))


def is_checkpoint(folder, model_type):
    """Whether a folder holds nothing but a checkpoint of that type, or nothing at all."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in folder.iterdir()]
    known = (".json", ".safetensors", ".model", ".jinja", "README.md", "vocab.txt", "merges.txt")
    if "config.json" not in names or not all(name.endswith(known) for name in names):
        return not names  # an empty folder may become one
    return json.loads((folder / "config.json").read_text()).get("model_type") == model_type


def put_in_place(partial, path):
    """Gives a whole folder its name, in the place of the one that may be there, and returns it."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def take_back(path):
    """Undoes a `put_in_place` that was killed between its two renames."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
