"""Tables and charts of `notebooks/studies/cost_and_scale`: the cost of a conversion, predicted from shapes and measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dha_utils.compare import cost
from dha_utils.plan.partition import EXACT_HEADS
from dha_utils.plan.prices import MEASURED_TOKENS, head_grid
from dha_utils.plots import COLORS, plain_log

NAMES = ("layers", "hidden", "heads", "key_value_heads", "mlp", "vocabulary")  # of the FIELDS, in conversion_cost.csv
SHAPES = {
    name: dict(zip(NAMES, cost.SHAPES[name].values()))
    for name in ("LLaMA-2-7B", "LLaMA-2-13B", "Llama-3-8B", "Llama-3-70B")
}
ROUNDS = 2  # of gradient steps on an attention, and on a layer, that a refit takes; it stops where they no longer help
FIT = 3  # a forward and a backward pass take about three forward passes
LIBRARIES = 0.5  # GiB of a process that has imported torch and transformers and done nothing
SEARCHED = 128  # the width of the heads in search_cost.csv


def layer_flops(shape, tokens, length):
    """Floating-point operations of one forward pass of one layer, [attention, MLP], for `tokens` in blocks of `length`."""
    width = shape["hidden"] // shape["heads"]
    projections = shape["hidden"] * width * (2 * shape["heads"] + 2 * shape["key_value_heads"])
    return np.array(
        [2 * tokens * (projections + length * width * shape["heads"] * 2), 2 * tokens * 3 * shape["hidden"] * shape["mlp"]]
    )


def conversion_flops(shape, tokens, length):
    """{stage: floating-point operations} of `convert`: matrix products only, the search for groups left out.

    `shape`: a mapping with layers, hidden, heads, key_value_heads, mlp.
    """
    attention, mlp = layer_flops(shape, tokens, length)
    moments = tokens * shape["hidden"] ** 2 * 2 * (2 + shape["heads"] / 4)
    width = shape["hidden"] // shape["heads"]
    rows = width * (shape["heads"] + 4 * shape["key_value_heads"])
    energies = 2 * shape["hidden"] ** 2 * rows + 2 * shape["hidden"] * (width * shape["key_value_heads"]) ** 2
    piece_attention, piece_mlp = layer_flops(shape, MEASURED_TOKENS, MEASURED_TOKENS // 8)
    branches = 2 * len(head_grid(int(shape["key_value_heads"])))
    priced = branches * (2 * piece_attention + piece_mlp) + (2 + FIT) * (piece_attention + piece_mlp)
    fitted = 0.75 * ROUNDS * FIT * (2 * attention + (attention + mlp))
    walked = 2 * moments + 4 * (attention + mlp)
    return {
        "pricing": shape["layers"] * (attention + mlp + moments + energies + priced),
        "converting": shape["layers"] * (walked - moments + energies + fitted),
    }


def layer_gib(shape, tokens):
    """GiB that one layer takes at most: weights in float32, six times over (source, fused, a copy to go back to, slopes and
    the two averages of Adam), and twice in the checkpoint's 16 bits (read, written), streams of the calibration text, and
    moments in float64."""
    width = shape["hidden"] // shape["heads"]
    weights = shape["hidden"] * (width * 2 * (shape["heads"] + shape["key_value_heads"]) + 3 * shape["mlp"])
    return ((4 * 6 + 2 * 2) * weights + 4 * 6 * tokens * shape["hidden"] + 8 * 6 * shape["hidden"] ** 2) / 2**30


def head_gib(shape):
    """GiB of embeddings and head, in float32."""
    return 2 * 4 * shape["vocabulary"] * shape["hidden"] / 2**30


def search_seconds(shape, searches):
    """Seconds per layer of the search for groups, by `searches` (search_cost.csv), between whose heads it interpolates.

    Up to `EXACT_HEADS` the exact search, the fast one beyond. 0, so left in the pricing, for fewer heads than were measured
    and for heads of another width.
    """
    heads, way = shape["key_value_heads"], "exact" if shape["key_value_heads"] <= EXACT_HEADS else "fast"
    measured = searches[searches["search"] == way].groupby("heads")["seconds"].sum()
    if shape["hidden"] != SEARCHED * shape["heads"] or heads < measured.index[0]:
        return 0.0
    return np.exp(np.interp(np.log(heads), np.log(measured.index), np.log(measured)))


def cost_table(rows, searches):
    """Measured beside predicted, one row per case: seconds, and operations per second that each stage reached."""
    table = {}
    for case, stages in rows.groupby("case", sort=False):
        shape = stages.iloc[0]
        flops = conversion_flops(shape, shape["tokens"], shape["length"])
        seconds = stages.set_index("stage")["seconds"]
        search = shape["layers"] * search_seconds(shape, searches)
        table[case] = {"layers": shape["layers"], "tokens": shape["tokens"], "search: s": search}
        for stage, count in flops.items():
            spent = seconds[stage] - (search if stage == "pricing" else 0)
            table[case] |= {f"{stage}: s": spent, f"{stage}: GFLOP/s": count / spent / 1e9}
        table[case] |= {"whole: s": seconds["convert"], "peak: GiB": stages["peak_gib"].max()}
        table[case]["predicted: GiB"] = LIBRARIES + layer_gib(shape, shape["tokens"]) + head_gib(shape)
    return pd.DataFrame(table).T


def growth(rows):
    """Seconds and GiB of a conversion, one row per dimension of a random model, one column per size over the base's."""
    whole, table = rows[rows["stage"] == "convert"].set_index("case"), {}
    for dimension in ("layers", "heads", "hidden"):
        cases = whole[whole.index.str.startswith((dimension, "base"))].sort_values(dimension)
        times = cases[dimension] / whole.loc["base", dimension]
        for column, unit in (("seconds", "seconds"), ("peak_gib", "GiB")):
            table[unit, dimension] = dict(zip(times, cases[column]))
    return pd.DataFrame(table).T.sort_index(axis=1).rename_axis(index=["measured", "varied"], columns="size / base")


def growth_chart(table, title):
    """Seconds (left) and peak memory (right) of a conversion over each dimension, from `growth`."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = {"layers": "layers", "heads": "heads (narrower ones)", "hidden": "hidden size (MLP, head width)"}
    for axis, unit, label in zip(axes, ("seconds", "GiB"), ("seconds (log scale)", "peak resident memory (GiB)")):
        for (dimension, name), marker, color in zip(labels.items(), "osD", COLORS):
            measured = table.loc[(unit, dimension)].dropna()
            axis.plot(measured.index, measured, marker=marker, color=color, label=name)
        axis.set(xlabel="size, times that of the base case (log scale)", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(table.columns, [f"{times:g}" for times in table.columns])
    axes[0].set_yscale("log")
    plain_log(axes[0].yaxis)
    axes[1].set_ylim(0, None)
    axes[0].legend(title="varied")
    figure.suptitle(title)
    return figure


def scale_table(searches, tokens, length, tflops, efficiency, memory_gib):
    """What the published shapes would take: minutes on a device of `tflops`, the share `efficiency` of it used, and GiB.

    The search for groups takes the seconds that it took where `searches` was measured.
    """
    table = {}
    for name, shape in SHAPES.items():
        flops = sum(conversion_flops(shape, tokens, length).values())
        minutes, search = flops / (tflops * 1e12 * efficiency) / 60, shape["layers"] * search_seconds(shape, searches) / 60
        gib = LIBRARIES + layer_gib(shape, tokens) + head_gib(shape)
        table[name] = {"10¹⁵ FLOP": flops / 1e15, "matrix products: min": minutes, "search: min": search}
        table[name] |= {"whole: min": minutes + search, "GiB": gib, "fits": "yes" if gib < memory_gib else "no"}
    return pd.DataFrame(table).T
