"""The charts of notebooks 01-05. Each function draws one figure, for `show`; the table behind it is the notebook's."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from .measure.similarity import pair_distance

sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
COLORS = sns.color_palette("colorblind")
START_COLORS = {"broken": COLORS[3], "damaged": COLORS[1], "repaired": COLORS[0], "source": COLORS[7]}
pd.options.display.max_colwidth = None  # sentences in tables are shown whole
YARDSTICKS = {
    "weight_cka": "weight CKA",
    "activation_cka": "activation CKA",
    "spectral": "spectral similarity",
    "energy_lost": "energy lost",
}
KIND_COLORS = {"query": COLORS[7], "key": COLORS[0], "value": COLORS[1]}


def show(figure):
    """Show a chart at once, above what its cell ends with: Jupyter shows the figures that are left open last of all."""
    display(figure)
    plt.close(figure)


def plain_log(axis):
    """Numbers as people write them on a logarithmic `axis.xaxis` or `axis.yaxis`."""

    def between(x, _):
        low, high = axis.get_view_interval()
        return f"{x:,g}" if high < 100 * low and f"{x:.0e}"[0] in "235" else ""

    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(between)


def yardstick_scatter(pairs, agreement, title):
    """What fusing two heads costs over their distance by four yardsticks: keys above, values below, ρ in each title.

    `pairs`: the rows of `benchmarks/similarity.py`; `agreement`: `rank_agreement(pairs)`.
    """
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.5), sharex="col", sharey="row", layout="constrained")
    for row, kind in zip(axes, ("key", "value")):
        chosen = pairs[pairs["kind"] == kind]
        for axis, (measure, name) in zip(row, YARDSTICKS.items()):
            dots = {"c": chosen["layer"], "cmap": "cividis", "s": 14, "alpha": 0.8}
            image = axis.scatter(pair_distance(chosen, measure), chosen["divergence"], **dots)
            axis.set(title=f"{kind}s, {name}\nρ = {agreement.loc[measure, (kind, 'ρ')]:.2f}", yscale="log")
        row[0].set_ylabel("cost: KL from the source\n(nats a token, log scale)")
    for axis in axes[1, :2]:
        axis.set_xlabel("1 − similarity")
    for axis, label in zip(axes[1, 2:], ("1 − similarity (log)", "energy lost (log)")):
        axis.set(xscale="log", xlabel=label)
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 3), numticks=5))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    figure.colorbar(image, ax=axes, label="layer", shrink=0.6).ax.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure


def planted_strips(distances, title):
    """Distances of all pairs of a planted checkpoint (`planted_distances`): copies in disguise beside strangers."""
    grid = sns.catplot(
        # exact zeros have no place on a log scale
        distances.assign(
            distance=distances["distance"].clip(lower=1e-9),
            metric=distances["metric"].map(YARDSTICKS).str.replace(" ", "\n"),
        ),
        **{"x": "metric", "y": "distance", "hue": "pair", "col": "heads", "kind": "strip"},
        **{"dodge": True, "size": 4, "alpha": 0.5, "height": 4, "palette": {"copies": COLORS[2], "strangers": COLORS[3]}},
    )
    grid.set(yscale="log", ylabel="distance: 1 − similarity (log scale)", xlabel="")
    for axis in grid.axes.flat:
        axis.axhline(1e-9, color="0.5", linestyle=":")
    grid.axes.flat[0].annotate("0, up to rounding", (0, 1e-9), (0, 5), textcoords="offset points", ha="center", fontsize=9)
    grid.set_titles("{col_name}s")
    grid.figure.suptitle(title, y=1.03)
    return grid.figure


def layer_lines(table, title, ylabel="mean similarity of two heads", apart=False):
    """Lines over the layers, one per column of a pandas table; `apart`: each in a panel of its own, with its own scale."""
    panels = table.shape[1] if apart else 1
    figure, axes = plt.subplots(1, panels, figsize=(4.5 + 2.5 * panels, 3.6), squeeze=False, layout="constrained")
    for place, (column, marker) in enumerate(zip(table, "osD^v")):
        axis = axes[0, place if apart else 0]
        axis.plot(table.index, table[column], marker=marker, label=column, color=KIND_COLORS.get(column, COLORS[place]))
        axis.set(title=column if apart else None, xlabel="layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel(ylabel)
    if not apart:
        axis.set_ylim(0, None)
        axis.legend()
    figure.suptitle(title)
    return figure


def head_trees(distances, layers, title, ylabel):
    """Dendrograms of the key heads (above) and value heads (below) of the chosen layers.

    `distances`: {"key": {layer: [heads, heads]}, "value": ...}.
    """
    size = (3 * len(layers) + 0.5, 5)
    figure, axes = plt.subplots(2, len(layers), figsize=size, sharey="row", squeeze=False, layout="constrained")
    joins = {}
    for row, kind in zip(axes, ("key", "value")):
        for axis, layer in zip(row, layers):
            axis.set(title=f"{kind}s, layer {layer}", xlabel="head")
            axis.grid(False)
            distance = np.clip(distances[kind][layer], 1e-6, None)
            if len(distance) == 1:
                axis.text(0.5, 0.5, "one head: nothing to join", ha="center", transform=axis.transAxes)
                continue
            np.fill_diagonal(distance, 0)
            tree = linkage(squareform(distance, checks=False), "average")
            dendrogram(tree, ax=axis, color_threshold=0, above_threshold_color=KIND_COLORS[kind])
            joins.setdefault(kind, []).extend(tree[:, 2])
        if kind in joins:
            limits = (min(joins[kind]) / 2, 2 * max(joins[kind]))
            row[0].set(yscale="log", ylim=limits, ylabel=ylabel)
    figure.suptitle(title)
    return figure


def perplexity_dots(table, base, title, control=None):
    """Perplexity of each row of a table (or Series) as dots with their values, on a log scale.

    Lines: the source's, `base`, and that of the source trained alike, `control`, if there is one.
    """
    columns = table.to_frame() if table.ndim == 1 else table
    figure, axis = plt.subplots(figsize=(8.5, 0.45 * columns.size + 1.4), layout="constrained")
    step = 0.8 / columns.shape[1]
    for place, (name, marker) in enumerate(zip(columns, "osD^")):
        heights = np.arange(len(columns))[::-1] - (place - (columns.shape[1] - 1) / 2) * step
        axis.plot(columns[name], heights, marker, color=COLORS[place], markersize=8, label=name)
        for x, y in zip(columns[name], heights):
            axis.annotate(f"{x:,.1f}" if x < 100 else f"{x:,.0f}", (x, y), (8, -4), textcoords="offset points", fontsize=10)
    if control:  # broad and pale: the two lines may fall together
        axis.axvline(control, color="0.3", alpha=0.3, linewidth=6, label=f"source, trained alike: {control:.1f}")
    axis.axvline(base, color="0.3", linestyle="--", label=f"source: {base:.1f}")
    axis.set_yticks(np.arange(len(columns))[::-1], columns.index)
    axis.set(title=title, xlabel="validation perplexity (log scale; lower is better)", xscale="log")
    axis.margins(x=0.12)
    plain_log(axis.xaxis)
    handles, labels = axis.get_legend_handles_labels()
    shown = slice(-1 if columns.shape[1] == 1 else 0, None)
    figure.legend(handles[shown], labels[shown], loc="outside right center")
    return figure


def recovery_curves(logs, base, title):
    """Validation perplexity over tokens, a line per run of {"start, aim": training_log}: all, and what is near the source.

    A start has its colour in every chart, an aim its line.
    """
    perplexities = [log["perplexity"] for log in logs.values()]
    near = min(base, *map(min, perplexities)) / 1.02, base * 1.3
    panels = 2 if max(map(max, perplexities)) > near[1] else 1
    figure, axes = plt.subplots(1, panels, figsize=(3 + 4 * panels, 4.2), squeeze=False, layout="constrained")
    for axis in axes[0]:
        for (name, log), marker in zip(logs.items(), "osD^vP*"):
            start, aim = name.split(", ")
            look = {"color": START_COLORS[start], "linestyle": "--" if aim == "distilled" else "-"}
            axis.plot(log["tokens"] / 1e3, log["perplexity"], marker=marker, label=name, **look)
        axis.axhline(base, color="black", linestyle=":", label=f"source, untrained: {base:.1f}")
        axis.set_xlabel("training tokens (thousands)")
    if panels == 2:
        axes[0, 0].set(title="all (log scale)", yscale="log")
        plain_log(axes[0, 0].yaxis)
        axes[0, 1].set(title="near the source", ylim=near)
    axes[0, 0].set_ylabel("validation perplexity")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    return figure


def compression_chart(lines, marks, bytes_per_token, title):
    """Perplexity over the source's, by head budget: all of it above, 1 to 2 times below, lines labelled at their ends.

    `lines`: {name: Series of ratios by budget}, before training; `marks`: one trained model a row, with "budget", "ratio",
    "tokens". The upper axis is the size of the KV cache in bytes a token, `bytes_per_token` at a budget of 1.
    """
    figure, axes = plt.subplots(2, 1, figsize=(10, 9), sharex=True, layout="constrained")
    colors = [COLORS[place] for place in (7, 9, 0, 3, 4, 2)]
    for axis, scale, top in zip(axes, ("log", "linear"), (None, 2)):
        styles = zip(colors, "osD^vP", ("-", "--", "-.", "-", ":", (0, (5, 1))))
        for line, (color, marker, style) in zip(lines.values(), styles):
            axis.plot(line.index * 100, line, color=color, marker=marker, linestyle=style)
        for (name, row), marker in zip(marks.iterrows(), "*PXhd"):
            label = f"{name}, after {row['tokens'] / 1e3:.0f} k tokens"
            axis.scatter(
                row["budget"] * 100, row["ratio"], s=110, marker=marker, color="white", edgecolor="black", label=label
            )
        axis.set(ylabel=f"perplexity / source's ({scale} scale)", yscale=scale, ylim=(0.97, top))
        place = -np.inf
        for name, end, color in sorted(zip(lines, (line.iloc[-1] for line in lines.values()), colors), key=lambda x: x[1]):
            _, height = (axis.transData - axis.transAxes).transform((0, end if top is None else min(end, top)))
            place = max(height, place + 0.06)  # names stand apart
            axis.text(1.01, place, name, transform=axis.transAxes, color=color, va="center", fontsize=11)
    plain_log(axes[0].yaxis)
    axes[0].set_xlim(102, 100 * min(*(line.index.min() for line in lines.values()), marks["budget"].min()) - 3)
    axes[1].set_xlabel("head budget: key and value heads kept (% of the source's)")
    cache = (lambda x: x / 100 * bytes_per_token, lambda x: x * 100 / bytes_per_token)
    axes[0].secondary_xaxis("top", functions=cache).set_xlabel("KV cache (bytes a token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    figure.suptitle(title)
    return figure


def fusion_curves(log, title):
    """A learned fusion over its tokens (`training_log`): L_fusion, its target, λ, perplexity with ω as is and averaged."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    thousands = log["tokens"] / 1e3
    axes[0].plot(thousands, log["fusion_loss"], marker="o", label="L_fusion")
    axes[0].plot(thousands, log["target"], marker="s", linestyle="--", label="target t")
    axes[0].set(title="fusion loss", ylabel="squared distance\nof ω rows")
    axes[1].plot(thousands, log["multiplier"], marker="D", color=COLORS[4])
    axes[1].set(title="multiplier λ", ylabel="price of a unit\nof L_fusion (nats)")
    axes[2].plot(thousands, log["perplexity"], marker="o", label="each query head with its own mixture")
    axes[2].plot(
        thousands, log["collapsed_perplexity"], marker="s", linestyle="--", label="mixtures averaged in each group"
    )
    axes[2].set(title="perplexity", ylabel="validation perplexity\n(log scale)", yscale="log")
    plain_log(axes[2].yaxis)
    for axis in axes:
        axis.set_xlabel("training tokens (thousands)")
    for axis in axes[::2]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle(title)
    return figure
