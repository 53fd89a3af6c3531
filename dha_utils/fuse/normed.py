"""Shared keys of a model that normalises queries and keys of each head before RoPE (Qwen3).

The norm takes the length out of every key, token by token, and its weights are those of all heads of a layer. So of the
keys' freedom, k_p → c k_p and q_p → q_p / conj(c) in every plane, a checkpoint of that family has left only c = ±1. A DHA
model gets the rest back by weights of its own behind the norms: one per key head and dimension, and a complex factor per
query head and plane (`query_gauge`). What stays lost is that a sum of normalised keys is not the norm of a sum: shared keys
are fused as if each norm divided by its root mean square, and the refit makes up for it. Values are as free as ever.
"""

import torch

from ..measure.energies import as_planes, from_planes, normed_rows
from ..measure.moments import with_bias
from ..sources.precision import as_float64
from .spectral import shared_planes


def fuse_normed_keys(attention, energies, group):
    """The shared key head of `group`: (rows of k_proj [d, n], weights of its norm [d], gauge of the group's queries [g, d],
    the RoPE frequency of each plane [d/2])."""
    d, plain = attention.head_dim, energies.plain
    into, back, plane = shared_planes(energies, group)
    key = as_planes(normed_rows(attention.k_proj, attention.k_norm, plain), d)
    shared = from_planes(into.unsqueeze(-1).mul(key[group][:, plane]).sum(0, keepdim=True))  # [d, n], behind the norm
    gamma = as_float64(attention.k_norm.weight)[torch.cat([plane, plane + d // 2])]
    rows = shared / torch.where(gamma == 0, torch.inf, gamma)[:, None]
    own = plane_energy(as_float64(with_bias(attention.k_proj)).unflatten(0, (-1, d))[group], plain).mean(0)[plane]
    alpha = (plane_energy(rows, plain) / own.clamp(min=1e-150)).sqrt()  # before the norm, planes as large as they were
    rows = rows / torch.where(alpha == 0, torch.inf, alpha).repeat(2)[:, None]
    length = (plane_energy(rows, plain).sum() / d + attention.k_norm.variance_epsilon).sqrt()
    size = back.abs().square().mean(0).sqrt()  # balances the gauge: queries keep their length
    gauge = back / torch.where(size == 0, torch.inf, size)
    return rows, gamma * (alpha * size).repeat(2) * length, torch.cat([gauge.real, gauge.imag], -1), plane


def plane_energy(rows, plain):
    """Mean square [..., d/2] of both dimensions of each plane of a head's `rows` [..., d, n], from the input's moment."""
    return ((rows @ plain) * rows).sum(-1).unflatten(-1, (2, -1)).sum(-2)
