"""The energy that heads lose by sharing one, up to the exact freedoms of attention.

Values: v_h → v_h R, o_proj_h → R⁻¹ o_proj_h changes nothing for any invertible R, so a group may share any d-dimensional
space. Keys: RoPE turns plane p (dimensions p and p + d/2) as one complex number, so k_p → c k_p, q_p → q_p / conj(c)
changes nothing for any c ≠ 0; and a head may carry any choice of planes, as long as its queries carry the same.
In both cases the least squared error is the part that the leading eigenvectors of a second moment leave over.
"""

from dataclasses import dataclass

import torch

from ..sources.families import check_source
from ..sources.precision import as_float64
from .moments import each_moments, with_bias
from .stream import each_layer


def as_planes(rows, head_dim):
    """[heads · d, n] -> complex [heads, d/2, n], plane p made of dimensions p and p + d/2 (transformers' RoPE layout)."""
    real, imaginary = rows.unflatten(0, (-1, 2, head_dim // 2)).unbind(1)
    return torch.complex(real, imaginary)


def from_planes(planes):
    """The inverse of `as_planes`: complex [heads, d/2, n] -> [heads · d, n]."""
    return torch.stack([planes.real, planes.imag], 1).flatten(0, 2)


def key_and_query_planes(attention):
    """The weights of k_proj [heads, d/2, n] and, by key head, of q_proj [heads, queries, d/2, n] as complex planes."""
    key, query = (as_planes(as_float64(with_bias(p)), attention.head_dim) for p in (attention.k_proj, attention.q_proj))
    return key, query.unflatten(0, (len(key), -1))


def normed_rows(projection, norm, plain):
    """The rows of a projection [heads · d, n], in float64; with a `norm` of each head behind it, as that scales them.

    `plain` [n, n]: second moment of the input. A norm divides by a number that changes from token to token: here by its
    root mean square.
    """
    rows = as_float64(with_bias(projection))
    if norm is None:
        return rows
    heads = rows.unflatten(0, (-1, len(norm.weight)))
    energy = ((heads @ plain) * heads).sum(-1).mean(-1)  # [heads]
    return (heads * as_float64(norm.weight)[:, None] * (energy + norm.variance_epsilon).rsqrt()[:, None, None]).flatten(
        0, 1
    )


def plane_coherence(rotary, length, distances=64):
    """κ_p [d/2]: how far plane p still looks the same to a query over the nearest keys, |mean_Δ exp(iθ_pΔ)|².

    `length`: of the text, on which the frequencies of some scalings depend. Softmax ignores what all keys of a query have
    in common; RoPE turns a common part into differences unless θ_p is slow.
    """
    rotary(torch.zeros(1, device=rotary.inv_freq.device), torch.arange(length, device=rotary.inv_freq.device)[None])
    angles = torch.outer(rotary.inv_freq.float(), torch.arange(distances, device=rotary.inv_freq.device))
    return torch.polar(torch.ones_like(angles), angles).mean(1).abs().square()


@dataclass
class HeadEnergies:
    """Energies of one layer's key and value heads, from which the cost and the fusion of any group follow.

    `key_energy`: complex [d/2, heads, heads], G_hh' = √(w_h w_h') E[conj(k_h) k_h'] in each plane, w_h the mean squared
    magnitude of the queries of key head h. `value_energy`: [heads · d, heads · d], E[v vᵀ] of the attended values.
    `value_metric`: [heads · d, d], per head P_h = (Σ o_projᵀ o_proj)^½ over its query heads. Heads are the source's
    key-value heads. `plain`: the moment of that name, kept only where keys are normalised (`fuse/normed.py`). All in
    float64: a fusion that could be exact shall be, and the spectra fall steeply.
    """

    query_weight: torch.Tensor
    key_energy: torch.Tensor
    value_energy: torch.Tensor
    value_metric: torch.Tensor
    free_frequencies: bool = True
    plain: torch.Tensor | None = None

    @classmethod
    @torch.no_grad()
    def measure(cls, attention, rotary, moments, free_frequencies=True):
        d = attention.head_dim
        plain, seen, attended = (as_float64(moment) for moment in (moments.plain, moments.seen, moments.attended))
        norms = getattr(attention, "k_norm", None), getattr(attention, "q_norm", None)
        key, query = (normed_rows(p, n, plain) for p, n in zip((attention.k_proj, attention.q_proj), norms))
        value = as_float64(with_bias(attention.v_proj))
        output = as_float64(attention.o_proj.weight).T.unflatten(0, (len(key) // d, -1, d))  # [heads, queries, d, hidden]
        weight = (as_planes(query @ plain, d).conj() * as_planes(query, d)).real.sum(-1)  # [query heads, d/2]
        weight = weight.unflatten(0, (len(output), -1)).sum(1).clamp(min=0).sqrt()
        seen_energy, attended_energy = (
            torch.einsum("hpn,kpn->phk", as_planes(key @ moment, d).conj(), as_planes(key, d))
            * torch.einsum("hp,kp->phk", weight, weight)
            for moment in (seen, attended)
        )
        return cls(
            weight,
            seen_energy
            - plane_coherence(rotary, moments.length).to(attended_energy.device)[:, None, None] * attended_energy,
            value @ attended @ value.T,
            matrix_sqrt((output @ output.mT).sum(1)),
            free_frequencies,
            plain if norms[0] is not None else None,
        )

    @property
    def head_dim(self):
        return self.value_metric.shape[-1]

    def key_spectrum(self, group):
        """Eigenvalues [d/2, g] and eigenvectors [d/2, g, g] of the group's energy in each plane, ascending."""
        return torch.linalg.eigh(self.keys(group))

    def key_cost(self, group):
        """Energy of the scores that one shared key head for `group` loses, and the group's whole energy."""
        values = torch.linalg.eigvalsh(self.keys(group)).clamp(min=0)
        kept = values.flatten().topk(len(values)).values if self.free_frequencies else values[:, -1]
        return float(values.sum() - kept.sum()), float(values.sum())

    def value_cost(self, group):
        """Energy of the layer's output that one shared value head for `group` loses, and the group's whole energy."""
        values = torch.linalg.eigvalsh(self.weighted_values(group).float()).clamp(min=0)
        return float(values[: -self.head_dim].sum()), float(values.sum())

    def costs(self):
        """The costs of a group of key heads and of value heads, as functions, over the energy of all heads."""
        heads = range(len(self.query_weight))
        key_total, value_total = self.key_cost(heads)[1], sum(self.value_cost([head])[1] for head in heads)
        return (
            lambda group: share(self.key_cost(group)[0], key_total),
            lambda group: share(self.value_cost(group)[0], value_total),
        )

    def keys(self, group):
        return self.key_energy[:, list(group)][:, :, list(group)]

    def rows(self, group):
        d = self.head_dim
        return torch.cat([torch.arange(h * d, (h + 1) * d) for h in group])

    def weighted_values(self, group=None):
        """[g · d, g · d]: the energy of the values of a group, or of all, as the output projections weigh them."""
        group = list(range(len(self.value_metric)) if group is None else group)
        rows, metric = self.rows(group), self.value_metric[group]
        half = (metric @ self.value_energy[rows][:, rows].unflatten(0, (len(group), -1))).flatten(0, 1)
        return (metric @ half.T.unflatten(0, (len(group), -1))).flatten(0, 1)


def share(part, whole):
    """part / whole; of nothing, as the heads of a pruned layer have, nothing is lost."""
    return part / whole if whole else 0.0


def matrix_sqrt(matrix):
    """Symmetric square root of positive semi-definite matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def head_energies(model, blocks, free_frequencies=True, moments=None):
    """The energies of every layer's heads, from `blocks` of calibration tokens: one `HeadEnergies` per layer.

    `moments`: those that `collect_moments` gives for the blocks, if they are at hand.

    Raises ValueError without blocks, or as `collect_moments` does.
    """
    check_source(model)
    if blocks is None:
        raise ValueError("spectral fusion needs calibration text: pass blocks=token_blocks(tokenizer, texts)")
    at_hand = ((layer, moments[index]) for index, layer in each_layer(model))
    return [
        HeadEnergies.measure(layer.self_attn, model.model.rotary_emb, its_moments, free_frequencies)
        for layer, its_moments in (each_moments(model, blocks) if moments is None else at_hand)
    ]
