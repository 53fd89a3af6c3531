"""The road DHA competes with: low-rank compression of the cache, measured the same way, without training.

Per layer, keys (before RoPE) and values are rebuilt from one cached vector of rank r: [K; V] = B A x, with A and B the
truncated SVD of the stacked projections, whitened by the second moment of x, so that the error of K and V on calibration
text is least. The cache holds r numbers a token instead of 2 · heads · head_dim.
"""

import copy

import torch

from dha_utils.measure.energies import matrix_sqrt
from dha_utils.measure.moments import set_rows, with_bias


@torch.no_grad()
def whitened_svd(model, moments):
    """Per layer, U, S of the stacked, whitened projections: [W_K; W_V] C^½ = U S Vᵀ, C from `collect_moments`."""
    layers = []
    for layer, its_moments in zip(model.model.layers, moments):
        rows = torch.cat([with_bias(layer.self_attn.k_proj), with_bias(layer.self_attn.v_proj)]).double()
        layers.append(torch.linalg.svd(rows @ matrix_sqrt(its_moments.plain.double()), full_matrices=False)[:2])
    return layers


def uniform_ranks(model, budget):
    """The same rank in every layer."""
    config = model.config
    return [round(budget * 2 * config.num_key_value_heads * config.head_dim)] * config.num_hidden_layers


def allocated_ranks(layers, ranks):
    """As many ranks in all, to the largest shares of their layer's energy: the least sum of relative errors."""
    shares = torch.stack([s.square() / s.square().sum() for _, s in layers])
    kept = torch.zeros(shares.numel(), dtype=torch.bool)
    kept[shares.flatten().topk(sum(ranks)).indices] = True
    return kept.view_as(shares).sum(1).clamp(min=1).tolist()


@torch.no_grad()
def low_rank_model(model, layers, ranks):
    """A copy of `model` whose keys and values have rank r in each layer: what the rebuilt cache would compute."""
    model = copy.deepcopy(model)
    for layer, (u, _), rank in zip(model.model.layers, layers, ranks):
        attention = layer.self_attn
        rows = torch.cat([with_bias(attention.k_proj), with_bias(attention.v_proj)]).double()
        key, value = (u[:, :rank] @ (u[:, :rank].T @ rows)).to(attention.k_proj.weight).chunk(2)
        set_rows(attention.k_proj, key)
        set_rows(attention.v_proj, value)
    return model
