"""Pictures that explain the method. Each function draws one figure and returns it; `plots.py` has the charts of results."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from .plots import COLORS, KIND_COLORS


def turned_plane(first, second, turn, title):
    """The keys of two heads in one RoPE plane, complex [tokens] each, as they are and with the second times `turn`."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4.2), sharex=True, sharey=True, layout="constrained")
    reach = 1.1 * float(max(keys.abs().max() for keys in (first, second, second * turn)))
    for axis, factor, name in zip(axes, (1, turn), ("as they are", "second head turned and scaled")):
        for keys, color, marker, label in ((first, 0, "o", "first head"), (second * factor, 1, "^", "second head")):
            axis.scatter(keys.real.cpu(), keys.imag.cpu(), s=10, alpha=0.4, color=COLORS[color], marker=marker, label=label)
        axis.axhline(0, color="0.6", linewidth=1)
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set(title=name, xlabel="number p of the key", aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    axes[0].set_ylabel("number p + d/2 of the key")
    axes[0].legend()
    figure.suptitle(title)
    return figure


def head_maps(panels, title, say=str.format):
    """Who reads which head: one panel per {name: (key_head_map, value_head_map)} over the same query heads.

    Query heads stand in the middle; lines lead up to the key head and down to the value head that each of them reads.
    `say`: of `report.wording`, for labels in another language.
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
        count = say("{kept} of {all} heads in the cache", kept=kept, all=2 * len(queries))
        axis.set(title=f"{name}\n{count}", ylim=(-1.4, 1.4), xticks=[], yticks=[])
        sns.despine(ax=axis, left=True, bottom=True)
    axes[0, 0].set_yticks([-1, 0, 1], [say("values"), say("queries"), say("keys")])
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
