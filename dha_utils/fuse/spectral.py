"""Spectral fusion: the best shared head of a group in closed form, from the leading eigenvectors of its energy.

`measure/energies.py` has the freedoms that this rests on, and the cost of a group.
"""

import torch

from ..measure.energies import from_planes, key_and_query_planes
from ..measure.moments import with_bias
from ..sources.precision import as_float64


def fuse_keys(attention, energies, group):
    """The shared key head of `group` and its query heads, gauge balanced; `energies`: the `HeadEnergies` of the layer.

    Returns the rows of k_proj [d, n], those of q_proj [queries · d, n] (query heads in the order of `group`) and the
    RoPE frequency of each plane [d/2].
    """
    into, back, plane = shared_planes(energies, group)
    key, query = key_and_query_planes(attention)
    shared = into.unsqueeze(-1).mul(key[group][:, plane]).sum(0, keepdim=True)
    queries = back[:, None, :, None] * query[group][:, :, plane]
    scale = balance(queries.abs().square().sum(-1).mean((0, 1)), shared[0].abs().square().sum(-1))
    return from_planes(shared * scale[:, None]), from_planes((queries / scale[:, None]).flatten(0, 1)), plane


def shared_planes(energies, group):
    """The shared key of a group, plane by plane: (factors [g, d/2] of its keys, of its queries, planes chosen [d/2])."""
    values, vectors = energies.key_spectrum(group)
    if energies.free_frequencies:
        chosen = values.flatten().topk(len(values)).indices.sort().values
    else:
        chosen = torch.arange(len(values)) * len(group) + len(group) - 1
    plane, rank = chosen // len(group), chosen % len(group)
    u = vectors[plane, :, rank].T  # [g, d/2]
    weight = energies.query_weight[group][:, plane]
    used = torch.where(weight > 0, weight, torch.inf)  # a query that the text never uses, a pruned head's, is dropped
    return u * weight, u / used, plane


def fuse_values(attention, energies, group):
    """The shared value head of `group`: rows of v_proj [d, n] and columns of o_proj [hidden, queries · d]."""
    d = attention.head_dim
    rows = energies.rows(group)
    values, vectors = torch.linalg.eigh(energies.weighted_values(group))
    values, vectors = values[-d:].clamp(min=max(values[-1] * 1e-12, 1e-150)), vectors[:, -d:]
    metric = torch.block_diag(*energies.value_metric[list(group)])
    shared = vectors.T @ metric @ as_float64(with_bias(attention.v_proj))[rows]
    back = energies.value_energy[rows][:, rows] @ metric @ vectors / values  # v_h from the shared value, least squares
    output = as_float64(attention.o_proj.weight).T.unflatten(0, (len(energies.value_metric), -1, d))[group]
    columns = back.unflatten(0, (len(group), d)).mT[:, None] @ output  # [g, queries, d, hidden]
    scale = balance(columns.square().sum(-1).mean((0, 1)), shared.square().sum(-1))
    return shared * scale[:, None], (columns / scale[:, None]).flatten(0, 2).T


def balance(first, second):
    """(first / second)^¼: dividing what has the squared norm `first` by it, multiplying the other, makes them equal.

    1 where either is zero.
    """
    return torch.where((first > 0) & (second > 0), first.sqrt() / second.sqrt(), 1.0).sqrt()
