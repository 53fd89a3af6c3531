"""The attention of one layer after fusion: its shared heads, maps, RoPE planes and weights."""

from dataclasses import dataclass

import torch

from ..measure.moments import with_bias
from ..model.config import DhaConfig
from ..model.dha import DhaAttention
from ..model.groups import register_tables
from ..sources.families import NORMED, NOT_LLAMAS
from .mean import mean_head
from .normed import fuse_normed_keys
from .spectral import fuse_keys, fuse_values


@dataclass
class FusedLayer:
    """The attention of one layer after fusion: its maps [query heads], RoPE planes [n_k, d/2] and weights by name."""

    key_head_map: list
    value_head_map: list
    key_frequencies: list
    weights: dict


@torch.no_grad()
def fuse_layer(attention, key_groups, value_groups, energies=None):
    """Fuse the heads of one `LlamaAttention`, by mean pooling if there are no `energies`."""
    d, queries_per_head = attention.head_dim, attention.num_key_value_groups
    query = with_bias(attention.q_proj).unflatten(0, (-1, d)).clone()
    output = attention.o_proj.weight.unflatten(1, (-1, d)).clone()
    keys, values, frequencies, norms = [], [], [], own_norms(attention, len(key_groups))
    for index, group in enumerate(key_groups):
        if energies is None or len(group) == 1:
            key, planes = mean_head(attention.k_proj, group, d), torch.arange(d // 2)
        elif norms:
            key, weight, gauge, planes = fuse_normed_keys(attention, energies, group)
            norms["k_norm.weight"][index] = weight
            norms["query_gauge"][query_heads(group, queries_per_head)] = gauge.repeat_interleave(queries_per_head, 0).to(
                query
            )
        else:
            key, rows, planes = fuse_keys(attention, energies, group)
            query[query_heads(group, queries_per_head)] = rows.unflatten(0, (-1, d)).to(query)
        keys.append(key.to(query))
        frequencies.append(planes.tolist())
    for group in value_groups:
        if energies is None or len(group) == 1:
            value = mean_head(attention.v_proj, group, d)
        else:
            value, columns = fuse_values(attention, energies, group)
            output[:, query_heads(group, queries_per_head)] = columns.unflatten(1, (-1, d)).to(output)
        values.append(value.to(output))
    maps = [head_map(groups, queries_per_head) for groups in (key_groups, value_groups)]
    rows = {"q_proj": query.flatten(0, 1), "k_proj": torch.cat(keys), "v_proj": torch.cat(values)}
    return FusedLayer(*maps, frequencies, weights_by_name(attention, rows, output.flatten(1)) | norms)


def own_norms(attention, keys):
    """The norms of a normalising attention (`normed.py`) as those of `keys` key heads and all query heads; {} without."""
    if not hasattr(attention, "q_norm"):
        return {}
    heads, d = attention.q_proj.out_features // attention.head_dim, attention.head_dim
    gauge = torch.cat([torch.ones(heads, d // 2), torch.zeros(heads, d // 2)], 1).to(attention.q_norm.weight)
    norms = {
        "q_norm.weight": attention.q_norm.weight.repeat(heads, 1),
        "k_norm.weight": attention.k_norm.weight.repeat(keys, 1),
    }
    return norms | {"query_gauge": gauge}


def weights_by_name(attention, rows, output):
    """The state dict of a fused attention from {projection: its rows, as of `with_bias`} and the weight of o_proj."""
    weights = {"o_proj.weight": output}
    if attention.o_proj.bias is not None:
        weights["o_proj.bias"] = attention.o_proj.bias.detach().clone()
    for name, weight in rows.items():
        if attention.q_proj.bias is not None:
            weights[f"{name}.bias"], weight = weight[:, -1], weight[:, :-1]
        weights[f"{name}.weight"] = weight
    return weights


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
    settings = {key: value for key, value in config.to_dict().items() if key not in NOT_LLAMAS}
    return DhaConfig(
        **settings | {"num_hidden_layers": len(fused_layers), "query_key_norm": config.model_type in NORMED},
        key_head_map=[layer.key_head_map for layer in fused_layers],
        value_head_map=[layer.value_head_map for layer in fused_layers],
        key_frequencies=frequencies if any(head != standard for heads in frequencies for head in heads) else None,
    )


def fused_attention(config, fused_layer):
    """A `DhaAttention` module that can stand in for the source's attention of that layer (no cache)."""
    settings = dha_config(config, [fused_layer])
    settings._attn_implementation = config._attn_implementation
    with torch.device("meta"):  # no random weights are drawn to be overwritten
        module = DhaAttention(settings, 0)
    weights = {
        name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in fused_layer.weights.items()
    }
    module.load_state_dict(weights, assign=True)  # whole: a fused optimiser would be wrong on parts of a tensor
    for part in module.modules():
        if hasattr(part, "tables"):
            register_tables(part)
    return module.to(fused_layer.weights["q_proj.weight"].device).eval()
