"""From a `HeadPlan` to a DHA model without training: the shared heads of each group, by mean pooling or spectral fusion.

The paper's learned linear fusion (DHA §4.2), which trains, is `linear.py`.
"""

import copy
from dataclasses import dataclass

import torch

from .modeling import DhaAttention, DhaConfig, DhaForCausalLM
from .spectral import SpectralLayer
from .statistics import check_source, collect_statistics, with_bias

METHODS = ("mean", "spectral")


def fuse(model, plan, blocks=None, method="spectral", free_frequencies=True, layers=None):
    """The DHA model of `plan`, made from a LLaMA `model` (multi-head or grouped-query) without any training.

    `method="mean"`: weights averaged over each group, as in GQA (Ainslie et al. 2023, §2.1). `method="spectral"`: the
    closed form of `spectral.py`, from `blocks` of calibration tokens [blocks, length], or from `layers`, what
    `spectral_layers` made of them. `free_frequencies=False` keeps the standard RoPE planes.

    Raises ValueError if the method is unknown, its calibration is missing, the plan is of another shape, or the model is
    a DHA model already.
    """
    check_method(method)
    check_plan(plan, model.config)
    if method == "spectral" and layers is None:
        layers = spectral_layers(model, blocks, free_frequencies)
    fused_layers = [
        fuse_layer(layer.self_attn, plan.key_groups[i], plan.value_groups[i], layers[i] if layers else None)
        for i, layer in enumerate(model.model.layers)
    ]
    return assemble(model, fused_layers)


def assemble(model, fused_layers):
    """The DHA model with the attention of `fused_layers`, one `FusedLayer` a layer, and all else from `model`."""
    with torch.device(model.device):
        fused = DhaForCausalLM(dha_config(model.config, fused_layers)).to(model.dtype)
    weights, own = model.state_dict(), fused.state_dict()
    weights = {name: weight for name, weight in weights.items() if name in own and ".self_attn." not in name}
    for i, layer in enumerate(fused_layers):
        weights |= {f"model.layers.{i}.self_attn.{name}": weight for name, weight in layer.weights.items()}
    fused.load_state_dict(weights)
    fused.generation_config = copy.deepcopy(model.generation_config)
    return fused.eval()


def check_method(method):
    if method not in METHODS:
        raise ValueError(
            f"there is no fusion method {method!r} without training: choose one of {', '.join(METHODS)}; the paper's "
            "linear fusion is dha_utils.linear.learn_fusion"
        )


def check_plan(plan, config):
    check_source(config)
    shape = (len(plan.key_groups), plan.source_heads)
    if shape != (config.num_hidden_layers, config.num_key_value_heads):
        raise ValueError(
            f"the plan is for {shape[0]} layers of {shape[1]} key-value heads, the model has "
            f"{config.num_hidden_layers} of {config.num_key_value_heads}: make a plan for this model"
        )


def spectral_layers(model, blocks, free_frequencies=True, statistics=None):
    """The energies of every layer's heads, from `blocks` of calibration tokens: one `SpectralLayer` a layer.

    `statistics`: what `collect_statistics` made of the blocks, if it is at hand.

    Raises ValueError without blocks.
    """
    if blocks is None:
        raise ValueError("spectral fusion needs calibration text: pass blocks=token_blocks(tokenizer, texts)")
    return [
        SpectralLayer.measure(layer.self_attn, model.model.rotary_emb, moments, free_frequencies)
        for layer, moments in zip(model.model.layers, statistics or collect_statistics(model, blocks))
    ]


@dataclass
class FusedLayer:
    """The attention of one layer after fusion: its maps [query heads], RoPE planes [n_k, d/2] and weights by name."""

    key_head_map: list
    value_head_map: list
    key_frequencies: list
    weights: dict


@torch.no_grad()
def fuse_layer(attention, key_groups, value_groups, spectral=None):
    """Fuse the heads of one `LlamaAttention`, by mean pooling if there is no `SpectralLayer`."""
    d, queries_per_head = attention.head_dim, attention.num_key_value_groups
    query = with_bias(attention.q_proj).unflatten(0, (-1, d)).clone()
    output = attention.o_proj.weight.unflatten(1, (-1, d)).clone()
    keys, values, frequencies = [], [], []
    for group in key_groups:
        if spectral is None or len(group) == 1:
            key, planes = mean_head(attention.k_proj, group, d), torch.arange(d // 2)
        else:
            key, rows, planes = spectral.fuse_keys(group)
            query[query_heads(group, queries_per_head)] = rows.unflatten(0, (-1, d)).to(query)
        keys.append(key.to(query))
        frequencies.append(planes.tolist())
    for group in value_groups:
        if spectral is None or len(group) == 1:
            value = mean_head(attention.v_proj, group, d)
        else:
            value, columns = spectral.fuse_values(group)
            output[:, query_heads(group, queries_per_head)] = columns.unflatten(1, (-1, d)).to(output)
        values.append(value.to(output))
    maps = [head_map(groups, queries_per_head) for groups in (key_groups, value_groups)]
    rows = {"q_proj": query.flatten(0, 1), "k_proj": torch.cat(keys), "v_proj": torch.cat(values)}
    return FusedLayer(*maps, frequencies, weights_by_name(attention, rows, output.flatten(1)))


def weights_by_name(attention, rows, output):
    """The state dict of a fused attention from {projection: what `with_bias` would give} and the weight of o_proj."""
    weights = {"o_proj.weight": output}
    if attention.o_proj.bias is not None:
        weights["o_proj.bias"] = attention.o_proj.bias
    for name, weight in rows.items():
        if attention.q_proj.bias is not None:
            weights[f"{name}.bias"], weight = weight[:, -1], weight[:, :-1]
        weights[f"{name}.weight"] = weight
    return weights


def mean_head(projection, group, head_dim):
    """[d, n]: the mean of the projection's heads in `group`."""
    return with_bias(projection).unflatten(0, (-1, head_dim))[group].mean(0)


def query_heads(group, queries_per_head):
    """The query heads of a group of key-value heads, in its order."""
    return [head * queries_per_head + i for head in group for i in range(queries_per_head)]


def head_map(groups, queries_per_head):
    """For each query head, the index of its group."""
    owner = {head: index for index, group in enumerate(groups) for head in query_heads(group, queries_per_head)}
    return [owner[head] for head in sorted(owner)]


def dha_config(config, fused_layers):
    """The `DhaConfig` of a LLaMA `config` with the layout of `fused_layers`."""
    standard = list(range(config.head_dim // 2))
    frequencies = [layer.key_frequencies for layer in fused_layers]
    settings = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return DhaConfig(
        **settings | {"num_hidden_layers": len(fused_layers)},
        key_head_map=[layer.key_head_map for layer in fused_layers],
        value_head_map=[layer.value_head_map for layer in fused_layers],
        key_frequencies=frequencies if any(head != standard for heads in frequencies for head in heads) else None,
    )


def fused_attention(config, fused_layer):
    """A `DhaAttention` module that can stand in for the source's attention of that layer (no cache)."""
    module = DhaAttention(dha_config(config, [fused_layer]), 0)
    module.load_state_dict(fused_layer.weights)
    module.config._attn_implementation = config._attn_implementation
    return module.to(fused_layer.weights["q_proj.weight"]).eval()
