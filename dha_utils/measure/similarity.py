"""How alike the heads of a checkpoint are (DHA §3 and B.1)."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap, sem, spearmanr

from ..sources.families import check_source
from .energies import HeadEnergies, share
from .moments import collect_moments, with_bias

METRICS = ("weight_cka", "activation_cka", "spectral")


@torch.no_grad()
def head_similarity(model, blocks=None, metric="weight_cka", moments=None):
    """Similarity of every two heads of a layer: {"query": [layers, H, H], "key": [layers, H_kv, H_kv], "value": same}.

    `"weight_cka"`: linear CKA of the weights, as in the paper (B.1). `"activation_cka"`: linear CKA of the outputs
    of the heads on `blocks`, centred (Kornblith et al. 2019). `"spectral"`: the share of energy that is kept if the two
    heads are fused into one, gauge freedoms used (`energies.py`); without "query", which is not fused. All are 1 on the
    diagonal, and at least 0; a head that is zero, as after pruning, is like no other by CKA, and free to fuse.
    `moments`: those that `collect_moments` gives for the blocks, if they are at hand.

    Raises ValueError if the metric is unknown, or needs calibration tokens and there are none, or for a DHA model.
    """
    check_source(model)
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}: choose one of {', '.join(METRICS)}")
    if metric == "weight_cka":
        moments = [None] * len(model.model.layers)
    elif moments is None and blocks is None:
        raise ValueError(f"the metric {metric!r} needs calibration text: pass blocks=token_blocks(tokenizer, texts)")
    attentions, moments = [layer.self_attn for layer in model.model.layers], moments or collect_moments(model, blocks)
    if metric == "spectral":
        layers = [
            _spectral_similarity(HeadEnergies.measure(attention, model.model.rotary_emb, its_moments))
            for attention, its_moments in zip(attentions, moments)
        ]
    else:
        layers = [_layer_cka(attention, its_moments) for attention, its_moments in zip(attentions, moments)]
    return {name: torch.stack([layer[name] for layer in layers]).cpu() for name in layers[0]}


def layer_redundancy(similarity):
    """Mean similarity over the pairs of different heads, [layers, heads, heads] -> [layers]; NaN if there is one head."""
    heads = similarity.shape[-1]
    return (similarity.sum((1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(1)) / (heads * (heads - 1))


def planted_distances(similarities, copies):
    """1 − similarity of every two heads of a planted checkpoint, a row each: metric, heads, pair ("copies", "strangers").

    `similarities`: {metric: `head_similarity`}. Every `copies` neighbours are one head in disguise.
    """
    tables = []
    for metric, similarity in similarities.items():
        for kind in ("key", "value"):
            i, j = torch.tril_indices(similarity[kind].shape[-1], similarity[kind].shape[-1], -1)
            pair = np.where(i // copies == j // copies, "copies", "strangers")
            distance = (1 - similarity[kind][:, i, j]).clamp(min=0).flatten()
            row = {"metric": metric, "heads": kind, "pair": np.tile(pair, len(similarity[kind])), "distance": distance}
            tables.append(pd.DataFrame(row))
    return pd.concat(tables, ignore_index=True)


def planted_contrast(distances):
    """How well yardsticks tell planted copies from strangers, per metric and kind: a table of `planted_distances`.

    If all are copies of one, there are no strangers: NaN, and None for "told apart".
    """
    grouped = distances.groupby(["metric", "heads", "pair"], sort=False)["distance"]
    figures = grouped.agg(["min", "mean", "max"]).unstack("pair").reindex(columns=["copies", "strangers"], level="pair")
    least = figures.get(("min", "strangers"), pd.Series(math.nan, figures.index))
    return pd.DataFrame(
        {
            "copies, mean": figures["mean", "copies"],
            "copies, most": figures["max", "copies"],
            "strangers, least": least,
            "strangers, mean": figures.get(("mean", "strangers"), least),
            "told apart": (figures["max", "copies"] < least).astype(object).where(least.notna(), None),
        }
    )


def cka(rows, middle):
    """Linear CKA of heads `rows` [heads, d, n] with W_iᵀ M W_j in the place of W_iᵀ W_j, `middle` M [n, n]: [heads, heads].

    DHA B.1: ‖W_iᵀW_j‖²_F / (‖W_iᵀW_i‖_F ‖W_jᵀW_j‖_F).
    """
    squared = torch.einsum("idn,nm,jem->ijde", rows, middle, rows).square().sum((2, 3))
    norm = squared.diagonal().sqrt()
    return (squared / torch.outer(norm, norm).clamp(min=torch.finfo(norm.dtype).tiny)).fill_diagonal_(1)


def _layer_cka(attention, moments):
    rows = {
        name: with_bias(projection).float().unflatten(0, (-1, attention.head_dim))
        for name, projection in (("query", attention.q_proj), ("key", attention.k_proj), ("value", attention.v_proj))
    }
    if moments is None:
        middle = torch.eye(rows["key"].shape[-1]).to(rows["key"])
    else:
        middle = moments.plain - torch.outer(moments.mean, moments.mean)
    return {name: cka(heads, middle) for name, heads in rows.items()}


def _spectral_similarity(layer):
    heads = len(layer.query_weight)
    lost = {
        "key": pair_table(lambda pair: share(*layer.key_cost(pair)), heads),
        "value": pair_table(lambda pair: share(*layer.value_cost(pair)), heads),
    }
    return {name: torch.from_numpy(1 - table).float() for name, table in lost.items()}


def pair_table(cost, heads):
    """What two heads cost, `cost((i, j))`, for every two of them: a symmetric [heads, heads], 0 on the diagonal."""
    table = np.zeros((heads, heads))
    for i, j in combinations(range(heads), 2):
        table[i, j] = table[j, i] = cost((i, j))
    return table


MEASURES = ("weight_cka", "activation_cka", "cosine", "omega", "spectral", "energy_lost")


def pair_distance(pairs, measure):
    """How far apart a measure finds the heads of each pair: 1 − similarity, or the energy that one shared head loses."""
    return pairs[measure] if measure == "energy_lost" else 1 - pairs[measure]


def rank_agreement(pairs, cost="divergence", resamples=1000, seed=0):
    """Does a pair that is more alike cost less to fuse? −Spearman's ρ of similarity and measured cost, one row per measure.

    `pairs`: the rows of `benchmarks/similarity.py`; `cost`: "divergence" or "rise". Columns (kind, "ρ" | "low" | "high" |
    "in a layer" | "±"): 1 would be the same order, 0 none; over the pairs of all layers, with a 95 % interval by bootstrap
    over the pairs; and the mean over the layers of that within each, with its standard error. "energy_lost" is a distance.
    """
    table = {}
    for kind, chosen in pairs.groupby("kind"):
        for measure in MEASURES:
            data = (pair_distance(chosen, measure).to_numpy(), chosen[cost].to_numpy())
            drawn = bootstrap(
                data,
                lambda distance, price: spearmanr(distance, price).statistic,
                paired=True,
                vectorized=False,
                n_resamples=resamples,
                method="percentile",
                rng=seed,
            ).confidence_interval
            figures = {"ρ": spearmanr(*data).statistic, "low": drawn.low, "high": drawn.high}
            layers = chosen.groupby("layer")
            within = [spearmanr(pair_distance(rows, measure), rows[cost]).statistic for _, rows in layers]
            figures |= {"in a layer": np.nanmean(within), "±": sem(within, nan_policy="omit")}
            table.setdefault(measure, {}).update({(kind, name): value for name, value in figures.items()})
    return pd.DataFrame(table).T
