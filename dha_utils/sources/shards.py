"""A checkpoint that is never in memory as a whole: its safetensors, read one decoder layer at a time."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from ..runs import content
from .checkpoints import explained, find_checkpoint, load_tokenizer
from .families import without_weights
from .output import INDEX
from .precision import pick_device


def open_checkpoint(name_or_path, device=None):
    """(model, tokenizer) as of `load_checkpoint`, but the decoder layers of the model are empty (device "meta").

    `measure.stream.each_layer` reads them from `model.shards`, one at a time; embeddings, last norm and head are there, in
    float32.

    Raises ValueError as `load_checkpoint` does, or if a shard is missing or cut short.
    """
    name, (source, config) = str(name_or_path), find_checkpoint(name_or_path)
    with explained(name):
        if not Path(source).is_dir():
            source = snapshot_download(
                source, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "README.md"]
            )
        shards = Shards(name, Path(source))
    device = pick_device(device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = shards.read([key for key in model.state_dict() if ".layers." not in key and key in shards], device)
    if config.tie_word_embeddings:
        head.setdefault("lm_head.weight", head.get("model.embed_tokens.weight"))
    lacking = [
        key for key in model.state_dict() if key not in head and key not in shards and not without_weights(config, key)
    ]
    if lacking:
        raise ValueError(f"{name!r} lacks {len(lacking)} weights that config.json asks for, the first is {lacking[0]}")
    model.load_state_dict(head, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # on the CPU, as from_pretrained does
    model.shards, model.checkpoint_dtype = shards, config.dtype or shards.dtype()
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval(), load_tokenizer(name, source, config)


BESIDE = (".json", ".model", ".jinja", ".md")  # the weights, in what a conversion depends on


class Shards:
    """The safetensors of a `folder`: which file holds which weight."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        if (folder / INDEX).is_file():
            self.files = json.loads((folder / INDEX).read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as opened:
                self.files = dict.fromkeys(opened.keys(), "model.safetensors")
        for file in sorted(set(self.files.values())):
            with explained(name), safe_open(folder / file, "pt") as opened:  # a file cut short is refused here
                opened.keys()

    def __contains__(self, key):
        return key in self.files

    def fingerprint(self):
        """Twelve digits that name the files by their content, weights, config, tokenizer and all."""
        files = set(self.files.values()) | {path.name for path in self.folder.iterdir() if path.suffix in BESIDE}
        return content({self.folder / file: file for file in sorted(files)})

    def dtype(self):
        """The dtype of the first weight of the first layer."""
        return self.raw(min(key for key in self.files if ".layers." in key)).dtype

    def raw(self, key):
        with explained(self.name), safe_open(self.folder / self.files[key], "pt") as opened:
            return opened.get_tensor(key)

    def read(self, keys, device):
        """{key: weight in float32}. Raises ValueError if one is not finite."""
        weights = {key: self.raw(key).to(device, torch.float32) for key in keys}
        for key, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(f"{key} of {self.name!r} is not finite: the checkpoint has NaN or infinite weights")
        return weights

    def layer(self, model, index):
        """Decoder layer `index` of a `model` of `open_checkpoint`, with its weights, in float32."""
        device, empty = model.model.embed_tokens.weight.device, model.model.layers[index]
        with torch.device("meta"):
            layer = type(empty)(model.config, index)
        keys = {f"model.layers.{index}.{key}": key for key in layer.state_dict()}
        weights = {keys[key]: weight for key, weight in self.read([key for key in keys if key in self], device).items()}
        for key, weight in layer.state_dict().items():
            if key not in weights:  # of those that stand for nothing in the family: `open_checkpoint` looked
                weights[key] = torch.zeros(weight.shape, device=device)
        layer.load_state_dict(weights, assign=True)
        return layer.eval().requires_grad_(True)
