"""Every figure of notebooks 01-05. Each function draws one figure and returns it; the table behind it is the notebook's."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
COLORS = sns.color_palette("colorblind")
KIND_COLORS = {"query": COLORS[7], "key": COLORS[0], "value": COLORS[1]}
SHEET = "cividis"  # a map that reads the same with every kind of colour vision


def plain_log(axis):
    """Numbers as people write them on a logarithmic `axis.xaxis` or `axis.yaxis`."""

    def between(x, _):
        low, high = axis.get_view_interval()
        return f"{x:,g}" if high < 100 * low and f"{x:g}"[0] in "235" else ""

    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(between)


def similarity_maps(similarity, layers, title):
    """Heat maps of keys (above) and values (below) for the chosen layers; `similarity` as `head_similarity` gives it."""
    figure, axes = plt.subplots(2, len(layers), figsize=(2.6 * len(layers) + 1, 5.4), squeeze=False, layout="constrained")
    for row, kind in zip(axes, ("key", "value")):
        for axis, layer in zip(row, layers):
            image = axis.imshow(similarity[kind][layer], vmin=0, vmax=1, cmap=SHEET)
            axis.set(title=f"{kind}s, layer {layer}", xlabel="head", ylabel="head")
            axis.grid(False)
            axis.set_xticks(range(len(similarity[kind][layer])))
            axis.set_yticks(range(len(similarity[kind][layer])))
    figure.colorbar(image, ax=axes, label="similarity (1 = interchangeable)", shrink=0.8)
    figure.suptitle(title)
    return figure


def layer_lines(table, title, ylabel="mean similarity of two heads"):
    """Lines over the layers, one per column of a pandas table."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for column, marker in zip(table, "osD^v"):
        axis.plot(table.index, table[column], marker=marker, label=column, color=KIND_COLORS.get(column))
    axis.set(title=title, xlabel="layer", ylabel=ylabel, ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    return figure


def head_trees(similarity, layers, title):
    """Dendrograms of the key heads (above) and value heads (below) of the chosen layers; distance is 1 − similarity."""
    figure, axes = plt.subplots(2, len(layers), figsize=(3 * len(layers) + 0.5, 5), squeeze=False, layout="constrained")
    for row, kind in zip(axes, ("key", "value")):
        for axis, layer in zip(row, layers):
            axis.set(title=f"{kind}s, layer {layer}", xlabel="head", ylabel="1 − similarity")
            axis.grid(False)
            distance = np.clip(1 - np.asarray(similarity[kind][layer]), 0, None)
            if len(distance) == 1:
                axis.text(0.5, 0.5, "one head: nothing to join", ha="center", transform=axis.transAxes)
                continue
            np.fill_diagonal(distance, 0)
            tree = linkage(squareform(distance, checks=False), "average")
            dendrogram(tree, ax=axis, color_threshold=0, above_threshold_color=KIND_COLORS[kind])
    figure.suptitle(title)
    return figure


def price_maps(prices, title, label):
    """[layers, 2, heads] as two heat maps, keys and values: one row per layer, one column per number of heads kept."""
    prices = np.asarray(prices)
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.8 + 0.28 * len(prices)), layout="constrained")
    for axis, kind in zip(axes, range(2)):
        sns.heatmap(
            prices[:, kind, : max(1, prices.shape[2] - 1)],  # all heads cost nothing: shown only if there is but one
            ax=axis,
            cmap=SHEET,
            vmin=0,
            vmax=prices.max(),
            annot=len(prices) <= 12,
            fmt=".2f",
            annot_kws={"size": 8},
            xticklabels=range(1, prices.shape[-1]),
            cbar_kws={"label": label},
        )
        axis.set(title=("keys", "values")[kind], xlabel="heads kept", ylabel="layer")
    figure.suptitle(title)
    return figure


def plan_bars(plans, title):
    """Key and value heads per layer (as the paper's Fig. 8), one panel per plan of the dictionary {name: plan}."""
    figure, axes = plt.subplots(
        len(plans), 1, figsize=(8, 2.4 * len(plans)), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, plan) in zip(np.atleast_1d(axes), plans.items()):
        layers = np.arange(len(plan.key_heads))
        axis.bar(layers - 0.2, plan.key_heads, 0.4, label="key heads", color=KIND_COLORS["key"])
        axis.bar(layers + 0.2, plan.value_heads, 0.4, label="value heads", color=KIND_COLORS["value"], hatch="//")
        axis.set(title=f"{name}: {plan.budget:.1%} of the source's heads", ylabel="heads kept", ylim=(0, plan.source_heads))
    axis.set_xlabel("layer")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    return figure


def perplexity_bars(table, base, title):
    """Perplexity of each row of a table (index: method), on a log scale, the source's as a line."""
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(table) + 1.6), layout="constrained")
    axis.barh(table.index[::-1], table["perplexity"][::-1], color=COLORS[0])
    axis.axvline(base, color=COLORS[3], linestyle="--", label=f"source: {base:.1f}")
    axis.set(title=title, xlabel="validation perplexity (log scale; lower is better)", xscale="log", xlim=(base / 2, None))
    plain_log(axis.xaxis)
    axis.legend()
    return figure


def recovery_curves(logs, base, title):
    """Validation perplexity over tokens, one line per run of the dictionary {name: training_log}."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, log), marker in zip(logs.items(), "osD^vP*"):
        axis.plot(log["tokens"] / 1e3, log["perplexity"], marker=marker, label=name)
    axis.axhline(base, color="black", linestyle="--", label=f"source, untrained: {base:.1f}")
    axis.set(title=title, xlabel="training tokens (thousands)", ylabel="validation perplexity (log scale)", yscale="log")
    plain_log(axis.yaxis)
    axis.legend()
    return figure


def compression_chart(table, trained, bytes_per_token, title):
    """Perplexity over head budget. `table`: budgets (index) × methods, before training; `trained`: metrics after it.

    The upper axis is the size of the KV cache in bytes a token, `bytes_per_token` at a budget of 1.
    """
    figure, axis = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for column, marker, style in zip(table, "osD^v", ("-", "--", "-.", ":", "-")):
        axis.plot(table.index * 100, table[column], marker=marker, linestyle=style, label=f"{column}, untrained")
    for (name, row), marker, color in zip(trained.iterrows(), "*PXhd", COLORS[4:]):
        label = f"{name}, after {row['tokens'] / 1e3:.0f} k tokens"
        shape = {"s": 90, "color": color, "marker": marker, "edgecolor": "black", "zorder": 3}
        axis.scatter(row["budget"] * 100, row["perplexity"], label=label, **shape)
    axis.set(
        title=title,
        xlabel="head budget: key and value heads kept (% of the source's)",
        ylabel="validation perplexity (log scale; lower is better)",
        yscale="log",
    )
    plain_log(axis.yaxis)
    axis.invert_xaxis()
    top = axis.secondary_xaxis("top", functions=(lambda x: x / 100 * bytes_per_token, lambda x: x * 100 / bytes_per_token))
    top.set_xlabel("KV cache (bytes a token)")
    axis.legend(fontsize=9)
    return figure


def score_maps(history, layer, title):
    """Distances of the ω rows of query heads (`search_scores`) in one layer: one column per step, keys above values."""
    figure, axes = plt.subplots(2, len(history), figsize=(2.4 * len(history) + 1, 5.2), squeeze=False, layout="constrained")
    for row, kind in zip(axes, ("key", "value")):
        apart = {step: np.where(np.eye(len(s[kind][layer])), np.nan, s[kind][layer]) for step, s in history.items()}
        bottom, top = (bound(list(apart.values())) for bound in (np.nanmin, np.nanmax))
        for axis, (step, matrix) in zip(row, apart.items()):
            image = axis.imshow(matrix, vmin=bottom, vmax=top, cmap=SHEET)
            axis.set(title=f"{kind}s, step {step}", xlabel="query head", ylabel="query head")
            axis.grid(False)
        figure.colorbar(image, ax=row, label="squared distance")
    figure.suptitle(title)
    return figure


def fusion_curves(log, title):
    """A learned fusion over its tokens (`training_log`): L_fusion, its target, λ, perplexity with ω as is and averaged."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    thousands = log["tokens"] / 1e3
    axes[0].plot(thousands, log["fusion_loss"], marker="o", label="L_fusion")
    axes[0].plot(thousands, log["target"], marker="s", linestyle="--", label="target t")
    axes[0].set(title="fusion loss", ylabel="squared distance of ω rows")
    axes[1].plot(thousands, log["multiplier"], marker="D", color=COLORS[4])
    axes[1].set(title="multiplier λ", ylabel="price of a unit of L_fusion (nats)")
    axes[2].plot(thousands, log["perplexity"], marker="o", label="each query head with its own ω")
    axes[2].plot(thousands, log["collapsed_perplexity"], marker="s", linestyle="--", label="ω averaged in each group")
    axes[2].set(title="perplexity", ylabel="validation perplexity (log scale)", yscale="log")
    plain_log(axes[2].yaxis)
    for axis in axes:
        axis.set_xlabel("training tokens (thousands)")
    axes[0].legend()
    axes[2].legend(loc="center right")
    figure.suptitle(title)
    return figure


def head_maps(panels, title):
    """Who reads which head: one panel per {name: (key_head_map, value_head_map)} over the same query heads.

    Query heads stand in the middle; lines lead up to the key head and down to the value head that each of them reads.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    for axis, (name, maps) in zip(axes[0], panels.items()):
        queries = np.arange(len(maps[0]))
        axis.scatter(queries, np.zeros(len(queries)), s=130, color=KIND_COLORS["query"], zorder=2)
        for kind, head_map, height, marker in zip(("key", "value"), map(np.asarray, maps), (1, -1), "sD"):
            means = [queries[head_map == head].mean() for head in range(head_map.max() + 1)]
            places = (np.argsort(np.argsort(means)) + 0.5) * len(queries) / len(means) - 0.5
            axis.plot([queries, places[head_map]], [[0] * len(queries), [height] * len(queries)], color="0.7", zorder=1)
            axis.scatter(places, [height] * len(places), s=170, marker=marker, color=KIND_COLORS[kind], zorder=2)
        kept = len(set(maps[0])) + len(set(maps[1]))
        axis.set(title=f"{name}\n{kept} of {2 * len(queries)} heads in the cache", ylim=(-1.4, 1.4), xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    axes[0, 0].set_yticks([-1, 0, 1], ["values", "queries", "keys"])
    figure.suptitle(title)
    return figure


def pipeline_strips(strips, title):
    """Rows of boxes with arrows between them: {name of the row: [text of a box, …]}, the first row above."""
    figure, axis = plt.subplots(figsize=(11, 1.1 * len(strips) + 0.8), layout="constrained")
    arrow = {"arrowstyle": "->", "color": "0.3", "linewidth": 1.5}
    for row, steps in enumerate(strips.values()):
        width = 1 / len(steps)
        for place, text in enumerate(steps):
            box = {"boxstyle": "round", "facecolor": COLORS[9 if row % 2 else 8], "alpha": 0.35, "edgecolor": "0.4"}
            middle = (place + 0.5) * width
            axis.text(middle, -row, text, ha="center", va="center", fontsize=10, bbox=box)
            if place:
                axis.annotate("", (middle - 0.35 * width, -row), (middle - 0.65 * width, -row), arrowprops=arrow)
    axis.set(title=title, xlim=(0, 1), ylim=(0.5 - len(strips), 0.5), xticks=[])
    axis.set_yticks([-row for row in range(len(strips))], list(strips))
    sns.despine(ax=axis, left=True, bottom=True)
    axis.grid(False)
    return figure
