"""The heat maps of notebooks 01 and 02. Dark is near, alike, cheap, few: everywhere."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import LogNorm

SHEET = "cividis"  # a map that reads the same with every kind of colour vision


def similarity_maps(similarity, layers, title):
    """Heat maps of keys (above) and values (below) for the chosen layers; `similarity` as `head_similarity` gives it."""
    figure, axes = plt.subplots(2, len(layers), figsize=(2.6 * len(layers) + 1, 5.4), squeeze=False, layout="constrained")
    for row, kind in zip(axes, ("key", "value")):
        for axis, layer in zip(row, layers):
            image = axis.imshow(similarity[kind][layer], vmin=0, vmax=1, cmap=SHEET + "_r")
            axis.set(title=f"{kind}s, layer {layer}", xlabel="head", ylabel="head")
            axis.grid(False)
            axis.set_xticks(range(len(similarity[kind][layer])))
            axis.set_yticks(range(len(similarity[kind][layer])))
    figure.colorbar(image, ax=axes, label="similarity (1 = interchangeable)", shrink=0.8)
    figure.suptitle(title)
    return figure


def price_maps(prices, title):
    """Prices [layers, 2, heads] in nats, keys and values: a row per layer, a column per number of heads kept."""
    thousandths = 1000 * np.asarray(prices)[..., : max(1, np.shape(prices)[2] - 1)]  # all heads cost nothing
    top = max(thousandths.max(), 1e-3)
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.8 + 0.28 * len(thousandths)), layout="constrained")
    for axis, kind in zip(axes, range(2)):
        look = {
            "norm": LogNorm(top / 1000, top, clip=True),
            "cmap": SHEET,
            "cbar": kind == 1,
            "cbar_kws": {"label": "nats / 1000"},
        }
        words = np.vectorize(lambda x: f"{x:.0f}" if x >= 10 else f"{x:.1f}")(thousandths[:, kind])
        look |= {"annot": words if len(words) <= 12 else None, "fmt": "", "annot_kws": {"size": 9}}
        sns.heatmap(thousandths[:, kind], ax=axis, xticklabels=range(1, thousandths.shape[2] + 1), **look)
        axis.set(title=("keys", "values")[kind], xlabel="heads kept", ylabel="layer")
    figure.suptitle(title)
    return figure


def plan_maps(plans, title):
    """Heads kept in each layer (as the paper's Fig. 8): keys above, values below, one row per plan of {name: plan}."""
    layers = len(next(iter(plans.values())).key_heads)
    size = (max(6.5, 2.5 + 0.36 * layers), 1.6 + 0.75 * len(plans))
    most = max(plan.source_heads for plan in plans.values())
    largest = max(max(plan.key_heads + plan.value_heads) for plan in plans.values())
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for axis, kind in zip(axes, ("key", "value")):
        rows = [getattr(plan, f"{kind}_heads") for plan in plans.values()]
        shown = {
            "vmin": 1,
            "vmax": largest + 1,
            "cmap": SHEET,
            "annot": True,
            "fmt": "d",
            "linewidths": 1,
            "cbar": False,
        }
        sns.heatmap(rows, ax=axis, yticklabels=[f"{name} ({sum(row)})" for name, row in zip(plans, rows)], **shown)
        axis.set(title=f"{kind} heads kept, of {most} (in brackets: in all layers)")
        axis.tick_params(axis="y", rotation=0)
    axes[1].set_xlabel("layer")
    figure.suptitle(title)
    return figure


def score_maps(history, layer, title):
    """Distances of the ω rows of query heads (`search_scores`) in one layer: one column per step, keys above values."""
    size = (2.4 * len(history) + 1, 5.6)
    figure, axes = plt.subplots(
        2, len(history), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for row, kind in zip(axes, ("key", "value")):
        apart = {step: np.where(np.eye(len(s[kind][layer])), np.nan, s[kind][layer]) for step, s in history.items()}
        bottom, top = (bound(list(apart.values())) for bound in (np.nanmin, np.nanmax))
        for axis, (step, matrix) in zip(row, apart.items()):
            image = axis.imshow(matrix, vmin=bottom, vmax=top, cmap=SHEET)
            axis.set_title(f"{kind}s, step {step}")
            axis.grid(False)
        row[0].set_ylabel("query head")
        figure.colorbar(image, ax=row, label="squared distance")
    for axis in axes[1]:
        axis.set_xlabel("query head")
    figure.suptitle(title)
    return figure
