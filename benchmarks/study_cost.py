"""Tables and charts of `notebooks/studies/cost_and_scale`: the cost of a conversion, predicted from shapes and measured."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dha_utils.plan.prices import MEASURED_TOKENS, head_grid
from dha_utils.plots import COLORS, plain_log

SHAPES = {  # published: arXiv 2307.09288 (LLaMA-2), 2407.21783 (Llama 3)
    "LLaMA-2-7B": {"layers": 32, "hidden": 4096, "heads": 32, "key_value_heads": 32, "mlp": 11008, "vocabulary": 32000},
    "LLaMA-2-13B": {"layers": 40, "hidden": 5120, "heads": 40, "key_value_heads": 40, "mlp": 13824, "vocabulary": 32000},
    "Llama-3-8B": {"layers": 32, "hidden": 4096, "heads": 32, "key_value_heads": 8, "mlp": 14336, "vocabulary": 128256},
    "Llama-3-70B": {"layers": 80, "hidden": 8192, "heads": 64, "key_value_heads": 8, "mlp": 28672, "vocabulary": 128256},
}
ROUNDS = 2  # of gradient steps on an attention, and on a layer, that a refit takes; it stops where they no longer help
FIT = 3  # a forward and a backward pass take about three forward passes


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
    the two averages of Adam), streams of the calibration text, and moments in float64."""
    width = shape["hidden"] // shape["heads"]
    weights = shape["hidden"] * (width * 2 * (shape["heads"] + shape["key_value_heads"]) + 3 * shape["mlp"])
    return (4 * 6 * weights + 4 * 5 * tokens * shape["hidden"] + 8 * 6 * shape["hidden"] ** 2) / 2**30


def head_gib(shape):
    """GiB of embeddings and head, in float32."""
    return 2 * 4 * shape["vocabulary"] * shape["hidden"] / 2**30


def cost_table(rows):
    """Measured beside predicted, one row per case: operations a second that each stage reached, and seconds in all."""
    table = {}
    for case, stages in rows.groupby("case", sort=False):
        shape = stages.iloc[0]
        flops = conversion_flops(shape, shape["tokens"], shape["length"])
        seconds = stages.set_index("stage")["seconds"]
        table[case] = {"layers": shape["layers"], "hidden": shape["hidden"], "key-value heads": shape["key_value_heads"]}
        for stage, count in flops.items():
            table[case] |= {f"{stage}: s": seconds[stage], f"{stage}: GFLOP/s": count / seconds[stage] / 1e9}
        table[case] |= {"whole: s": seconds["convert"], "peak: GiB": stages["peak_gib"].max()}
        table[case]["one layer, predicted: GiB"] = layer_gib(shape, shape["tokens"])
    return pd.DataFrame(table).T


def growth(rows):
    """How seconds and memory grow with each dimension of a random model: the exponent of a power law through its cases."""
    table, whole = {}, rows[rows["stage"] == "convert"]
    for dimension in ("layers", "heads", "hidden"):
        cases = whole[whole["case"].str.startswith((dimension, "base"))]
        sizes = np.log(cases[dimension].to_numpy(dtype=float))
        table[dimension] = {column: np.polyfit(sizes, np.log(cases[column]), 1)[0] for column in ("seconds", "peak_gib")}
    return pd.DataFrame(table).T.rename_axis("grows with")


def growth_chart(rows, title):
    """Seconds (left) and peak memory (right) of a conversion over each dimension, relative to the base case."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    whole = rows[rows["stage"] == "convert"]
    base = whole[whole["case"] == "base"].iloc[0]
    for (dimension, marker), color in zip({"layers": "o", "heads": "s", "hidden": "D"}.items(), COLORS):
        cases = whole[whole["case"].str.startswith((dimension, "base"))].sort_values(dimension)
        for axis, column in zip(axes, ("seconds", "peak_gib")):
            axis.plot(cases[dimension] / base[dimension], cases[column], marker=marker, color=color, label=dimension)
    for axis, label in zip(axes, ("seconds (log scale)", "peak resident memory (GiB)")):
        axis.set(xscale="log", xlabel="size, times that of the base case (log scale)", ylabel=label)
        plain_log(axis.xaxis)
    axes[0].set_yscale("log")
    plain_log(axes[0].yaxis)
    axes[1].set_ylim(0, None)
    axes[0].legend(title="varied")
    figure.suptitle(title)
    return figure


def scale_table(tokens, length, tflops, efficiency, memory_gib):
    """What the published shapes would take: minutes on a device of `tflops`, the share `efficiency` of it used, and GiB."""
    table = {}
    for name, shape in SHAPES.items():
        flops = sum(conversion_flops(shape, tokens, length).values())
        gib = layer_gib(shape, tokens) + head_gib(shape)
        table[name] = {"10¹⁵ FLOP": flops / 1e15, "minutes": flops / (tflops * 1e12 * efficiency) / 60, "GiB": gib}
        table[name]["fits"] = "yes" if gib < memory_gib else "no"
    return pd.DataFrame(table).T
