"""The folder that a conversion writes: it grows beside its name, is resumed, and never replaces anything else."""

import json
import shutil

from safetensors import safe_open
from safetensors.torch import save_file

from ..runs import write_whole
from .shards import INDEX


def is_finished(out, request):
    """Whether `out` holds this very conversion. Raises ValueError if it holds anything else."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    record = out / "conversion.json"
    if record.is_file() and json.loads(record.read_text())["request"] == as_json(request):
        return True
    raise ValueError(f"{out} is there and holds something else than this conversion: choose another folder")


def as_json(request):
    return json.loads(json.dumps(request))


def work_folder(out, request):
    """The folder beside `out` in which the conversion grows. Raises ValueError if another one is unfinished there."""
    work = out.with_name(f".{out.name}.converting")
    if (work / "request.json").is_file():
        stored, request = json.loads((work / "request.json").read_text()), as_json(request)
        changed = sorted(name for name in stored.keys() | request.keys() if stored.get(name) != request.get(name))
        if changed:
            raise ValueError(
                f"{work} holds an unfinished conversion with another {', '.join(changed)}: delete it, or choose another out"
            )
    write_whole(work / "request.json", json.dumps(request))
    return work


def check_disk(work, model, dtype, blocks):
    """Raises ValueError if the weights and the streams will not fit on the disk beside those that are there."""
    needed = model.num_parameters() * dtype.itemsize + 8 * 4 * blocks.numel() * model.config.hidden_size
    free = shutil.disk_usage(work).free + sum(file.stat().st_size for file in work.iterdir())
    if free < needed:
        raise ValueError(
            f"the conversion may take {needed / 1e9:.1f} GB of disk at {work.parent}, where {free / 1e9:.1f} GB are free"
        )


def write_weights(path, weights, dtype):
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: weight.to(dtype).cpu().contiguous() for name, weight in weights.items()}, partial, {"format": "pt"})
    partial.replace(path)


def write_index(folder):
    """The index of the shards of a folder, as transformers reads it."""
    files, total = {}, 0
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), path.name)
        total += path.stat().st_size
    write_whole(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1))
