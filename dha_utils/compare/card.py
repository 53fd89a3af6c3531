"""The model card (README.md) of a converted checkpoint: its source, the way it was made, and what that costs."""

import numpy as np
from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from ..measure.perplexity import interval
from ..runs import find
from ..sources.precision import as_dtype

CARD = """---
{data}
---

# {name}, with Decoupled-Head Attention

Made from `{name}`{revision} by `dha_utils.convert`, without training: groups of heads share one, in closed form{refit}. \
The method begins with *DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion* \
([arXiv 2406.06567](https://arxiv.org/abs/2406.06567)).

```python
import dha_utils  # registers the model type with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(...)
```

KV cache per token, in {dtype}: {kept:,} bytes, {share:.1%} of the source's {whole:,}.

{quality}Calibration: {calibration_tokens:,} tokens of {text}, in blocks of {length}{repeated}; seed {seed}; {versions}.

The relative error is that of the residual stream behind the layer, on held-out calibration text.

| layer | key heads | value heads | error, fused | error, fitted |
|---|---|---|---|---|
{rows}
"""
QUALITY = """Perplexity of held-out text ({blocks} blocks of {length} tokens of {text}, each on its own, in float32): \
source {source:.2f}, this model {fused:.2f}, {mean:.3f} times (95 % interval over blocks {low:.3f} to {high:.3f}).

"""


def model_card(model, config, record):
    """The text of a README.md, as `push_to_hub` uploads it, from the `record` of `convert` and the `DhaConfig` made."""
    request = record["request"] | {"text": record["request"]["text"] or "an unnamed text"}
    name, revision = request["source"], getattr(model.config, "_commit_hash", None)
    data = ModelCardData(
        base_model=name if "/" in name else None,
        license=source_licence(model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dha", "decoupled-head-attention"],
    )
    head_bytes = config.head_dim * as_dtype(request["dtype"]).itemsize
    own = {
        "name": name,
        "data": data.to_yaml(),
        "revision": f" (revision {revision})" if revision else "",
        "refit": ", each layer then fitted to the source" if request["refit"] else "",
        "kept": sum(keys + values for keys, values in config.head_counts()) * head_bytes,
        "whole": 2 * config.num_hidden_layers * config.source_num_key_value_heads * head_bytes,
        "share": config.budget,
        "quality": quality(record, request["text"]),
        "length": record["length"],
        "repeated": f" (blocks that say their first half twice: {n})" if (n := record["repeating"]) else "",
        "rows": "\n".join(map(row, range(config.num_hidden_layers), config.head_counts(), record["layers"])),
    }
    return CARD.format(**request | own)


def model_name(source):
    """A name on the hub as it is, of a folder the last part: no path of somebody's machine."""
    path = find(source)
    return path.resolve().name if path.is_dir() or source.count("/") != 1 else source


def source_licence(model):
    """The licence in the front matter of the README.md beside the weights, None if there is none."""
    readme = model.shards.folder / "README.md" if hasattr(model, "shards") else None
    try:
        return (metadata_load(readme) or {}).get("license") if readme and readme.is_file() else None
    except (ValueError, YAMLError):  # not UTF-8, or no front matter that can be read
        return None


def quality(record, text):
    """Perplexity before and after, with its protocol; nothing if it was not measured."""
    if "losses" not in record:
        return ""
    source, fused = (np.array(record["losses"][name]) for name in ("source", "fused"))
    figures = zip(("mean", "low", "high"), np.exp(interval(fused - source)))
    means = {"source": np.exp(source.mean()), "fused": np.exp(fused.mean())}
    return QUALITY.format(text=text, **dict(zip(("blocks", "length"), record["validation"])), **dict(figures), **means)


def row(index, counts, layer):
    """Of the table of layers: heads kept, and the errors before and after the refit."""
    stages = (("attention", "before"), ("layer", "after")) if layer["errors"] else ()
    errors = [f"{layer['errors'][stage][when]:.2g}" for stage, when in stages] or ["", ""]
    return f"| {index} | {counts[0]} | {counts[1]} | {' | '.join(errors)} |"
