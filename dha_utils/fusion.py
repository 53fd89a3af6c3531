"""From a `HeadPlan` to a DHA model without training: the shared heads of each group, by mean pooling or spectral fusion.

The paper's learned linear fusion (DHA §4.2), which trains, is `linear.py`.
"""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from .checkpoints import check_source, served_dtype
from .modeling import DhaAttention, DhaConfig
from .spectral import SpectralLayer
from .statistics import collect_statistics, with_bias

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
    check_plan(plan, model)
    if method == "spectral" and layers is None:
        layers = spectral_layers(model, blocks, free_frequencies)
    fused_layers = [
        fuse_layer(layer.self_attn, plan.key_groups[i], plan.value_groups[i], layers[i] if layers else None)
        for i, layer in enumerate(model.model.layers)
    ]
    return assemble(model, fused_layers)


def assemble(model, fused_layers):
    """The DHA model with the attention of `fused_layers`, one `FusedLayer` a layer, and all else from `model`."""
    # Made as from_pretrained makes it: .to(dtype) would round RoPE's frequencies, a GPU would compute others
    fused = AutoModelForCausalLM.from_config(dha_config(model.config, fused_layers), dtype=model.dtype).to(model.device)
    weights, own = model.state_dict(), fused.state_dict()
    weights = {name: weight for name, weight in weights.items() if name in own and ".self_attn." not in name}
    for i, layer in enumerate(fused_layers):
        weights |= {f"model.layers.{i}.self_attn.{name}": weight for name, weight in layer.weights.items()}
    fused.load_state_dict(weights)
    fused.generation_config = copy.deepcopy(model.generation_config)
    fused.checkpoint_dtype = served_dtype(model)
    return fused.eval()


def check_method(method):
    if method not in METHODS:
        raise ValueError(
            f"there is no fusion method {method!r} without training: choose one of {', '.join(METHODS)}; the paper's "
            "linear fusion is dha_utils.linear.learn_fusion"
        )


def check_plan(plan, model):
    check_source(model)
    config = model.config
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
    return with_bias(projection).float().unflatten(0, (-1, head_dim))[group].mean(0)


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
    settings = dha_config(config, [fused_layer])
    settings._attn_implementation = config._attn_implementation
    module = DhaAttention(settings, 0)
    module.load_state_dict(fused_layer.weights)
    return module.to(fused_layer.weights["q_proj.weight"]).eval()


@torch.no_grad()
def to_llama(model):
    """The plain grouped-query `LlamaForCausalLM` that computes what a DHA `model` does, for tools that know no DHA.

    Its query heads stand in another order, those of a group side by side.

    Raises ValueError unless every layer has the same number of key heads, as many value heads, both shared by the same
    query heads, in groups of one size, and standard RoPE planes: as from `fuse(model, HeadPlan.uniform(config, n, n),
    free_frequencies=False)`.
    """
    if model.config.model_type != "dha":
        raise ValueError(f"this is a {model.config.model_type!r} model: to_llama takes a DHA model")
    config, d = model.config, model.config.head_dim
    maps, kept = list(zip(config.key_head_map, config.value_head_map)), config.num_key_value_heads
    pairs = [Counter(zip(keys, values)) for keys, values in maps]  # (key head, value head): how many query heads
    plain = all(len(pair) == kept and len(set(pair.values())) == 1 for pair in pairs)
    if set(sum(config.head_counts(), ())) != {kept} or not plain or config.key_frequencies:
        raise ValueError(
            "a plain LLaMA cannot hold this model: it has one number of key and value heads in all layers, shared by the "
            "same query heads in groups of one size, with standard RoPE planes; fuse with HeadPlan.uniform(config, n, n), "
            f"where n divides {config.source_num_key_value_heads}, and free_frequencies=False"
        )
    own = ("model_type", "architectures", "key_head_map", "value_head_map", "key_frequencies", "source_num_key_value_heads")
    settings = {name: value for name, value in config.to_dict().items() if name not in own}
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=model.dtype).to(model.device)
    weights = model.state_dict()
    for index, (keys, values) in enumerate(maps):
        queries = sorted(range(len(keys)), key=keys.__getitem__)
        order = {"q_proj": queries, "v_proj": [values[keys.index(key)] for key in range(kept)]}
        for name in weights:
            layer, projection = f"layers.{index}.self_attn.", name.split(".")[-2]
            if layer in name and projection in order:
                weights[name] = weights[name].unflatten(0, (-1, d))[order[projection]].flatten(0, 1)
            elif layer in name and name.endswith("o_proj.weight"):
                weights[name] = weights[name].unflatten(1, (-1, d))[:, queries].flatten(1)
    llama.load_state_dict(weights)
    llama.generation_config = copy.deepcopy(model.generation_config)
    llama.checkpoint_dtype = served_dtype(model)
    return llama.eval()
