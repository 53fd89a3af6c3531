"""Tables and charts of `notebooks/studies/speed_and_memory`: what decoding costs, measured and predicted from bytes."""

import matplotlib.pyplot as plt
import numpy as np

from dha_utils.compare.decoding import CACHE_MOVES
from dha_utils.plots import COLORS, plain_log

MACHINE = ["dtype", "device", "processor", "threads"]
CASE = ["part", *MACHINE, "shape", "layers", "budgets", "batch", "context"]
OF_ALL_HEADS = ["source", "source, our code"]
SERIES = {"DHA": COLORS[0], "GQA": COLORS[1], "source, our code": COLORS[7]}


def moved_bytes(rows):
    """Bytes that one step moves, at least: the weights and the cache are read; `generate` also copies the cache, to which
    a `DynamicCache` appends by writing it anew; keys that are rebuilt are written and read."""
    moves = rows["part"].eq("generate").map({True: CACHE_MOVES, False: 1})
    return rows["weight_bytes"] + moves * rows["cache_bytes"] + 2 * rows["rebuilt_bytes"]


def speedups(rows):
    """How many times as fast as the source each method takes the step of each case: a row a case, budget and method.

    `speedup` is the median over the turns in which source and method were timed one after the other, `speedup_low` and
    `speedup_high` its quartiles, `predicted` what `moved_bytes` say; `seconds` are the method's own.
    """
    rows = rows[rows["part"] != "throughput"].assign(moved=moved_bytes)
    source = rows[rows["method"] == "source"].set_index(CASE)["moved"].rename("source_moved")
    rows = rows.join(source, on=CASE, validate="many_to_one")
    rows["predicted"] = rows["source_moved"] / rows["moved"]
    rows["new_tokens"] = rows["new_tokens"].fillna(1)  # of attention
    columns = ["seconds", "new_tokens", "speedup_low", "speedup", "speedup_high", "predicted"]
    return rows.set_index([*CASE, "budget", "method"])[columns]


def model_name(row):
    """“LLaMA-2-7B, 2 layers, bfloat16, AVX2”."""
    return f"{row['shape']}, {row['layers']} layer{'s' if row['layers'] > 1 else ''}, {row['dtype']}, {row['processor']}"


def named(speeds, part):
    """`speedups` of one part as columns, with `model` and `load` ("8 × 4,096": sequences × tokens of each) in words."""
    rows = speeds.xs(part, level="part").reset_index()
    order = ["dtype", "shape", "processor", "batch", "context"]
    rows = rows.sort_values(order, ascending=[False, True, True, True, True], kind="stable")
    rows["load"] = [f"{batch} × {context:,}" for batch, context in zip(rows["batch"], rows["context"])]
    return rows.assign(model=rows.apply(model_name, axis=1))


def speedup_chart(speeds, part, title):
    """`speedups` of one part: a panel a model, a line a load and budget; hollow is what the bytes predict."""
    rows = named(speeds, part)
    lines = rows[rows["method"] == "DHA"].sort_values(["batch", "context", "budget"], ascending=[True, True, False])
    models = rows["model"].unique()
    figure, axes = plt.subplots(
        len(models),
        1,
        sharex=True,
        squeeze=False,
        layout="constrained",
        figsize=(9, 2 + 0.32 * len(lines)),
        height_ratios=lines["model"].value_counts()[models],
    )
    for axis, model in zip(axes[:, 0], models):
        own = lines[lines["model"] == model]
        for height, dha in enumerate(own.itertuples()):
            here = rows[(rows["model"] == model) & (rows["load"] == dha.load) & rows["budget"].isin([dha.budget, 1.0])]
            here = here.set_index("method")
            for offset, (method, color) in enumerate(SERIES.items()):
                if method in here.index:
                    low, middle, high = here.loc[method, ["speedup_low", "speedup", "speedup_high"]]
                    bar = [[middle - low], [high - middle]]
                    axis.errorbar(middle, height + 0.22 * (offset - 1), xerr=bar, fmt="o", color=color, label=method)
            look = {"markerfacecolor": "none", "color": COLORS[0], "label": "DHA, predicted from bytes"}
            axis.plot(dha.predicted, height - 0.22, "o", **look)
        axis.axvline(1, color="black", linestyle="--", label="source")
        axis.set(title=model, xscale="log", ylim=(len(own) - 0.5, -0.5))
        axis.set_yticks(range(len(own)), own["load"] + own["budget"].map(", {:.0%}".format))
        plain_log(axis.xaxis)
    axes[-1, 0].set_xlabel("times as fast as the source (log scale; bars: quartiles)")
    figure.supylabel("sequences × tokens of each, share of the heads")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = dict(zip(labels, handles))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def method_and_budget(rows):
    """“DHA, 50%”; the method alone where it has all heads."""
    return rows["method"].where(rows["budget"] == 1, rows["method"] + rows["budget"].map(", {:.0%}".format))


def speed_table(speeds, part):
    """`speedups` of one part: a row a model and load, the source's milliseconds a token first."""
    rows = named(speeds, part)
    rows["column"] = method_and_budget(rows)
    order = rows.sort_values(["budget", "method"], ascending=[False, True])["column"].unique()
    key = ["model", "batch", "context"]
    table = (
        rows.pivot(index=key, columns="column", values="speedup").loc[rows.set_index(key).index.unique(), order].round(2)
    )
    source = rows[rows["method"] == "source"].set_index(key)
    milliseconds = source["seconds"] * 1000 / source["new_tokens"]
    table.insert(0, "source (ms)", milliseconds.round(1))
    return table.drop(columns="source").astype(object).fillna("–").rename_axis(columns=None)


def spread(values):
    """“0.94 to 3.33”, or “1.81” where there is one."""
    low, high = np.min(values), np.max(values)
    return f"{low:.2f}" if np.isclose(low, high) else f"{low:.2f} to {high:.2f}"


def beside(speeds, one, other):
    """How many times as fast as `other` method `one` is, case by case, at the same budget or beside all heads."""
    table = speeds["speedup"].unstack("method")
    if other in OF_ALL_HEADS:
        table[other] = table[other].groupby(level=CASE).transform("max")  # of the rows of all heads; the others have none
    return (table[one] / table[other]).dropna()


def throughput_table(rows):
    """Tokens a second with the largest batch that fits into the memory, one row a case, budget and method.

    Each took turns with the source, which stands beside it, as machines are not always as fast; "times the source's" is
    turn by turn.
    """
    case = [*MACHINE, "shape", "layers", "context", "memory_gib"]
    rows = rows[rows["part"] == "throughput"].reset_index(drop=True)
    rows["tokens a second"] = rows["batch"] * rows["new_tokens"] / rows["seconds"]
    source = rows[rows["method"] == "source"].set_index([*case, "rival", "budgets"])[["tokens a second", "batch"]]
    rows = rows.join(source.add_suffix(" of the source"), on=[*case, "rival", "budgets"], validate="many_to_one")
    rows["times the source's"] = rows["speedup"] * rows["batch"] / rows["batch of the source"]
    rows["times as long a token"] = 1 / rows["speedup"]
    rows["cache (GiB)"] = rows["cache_bytes"] / 2**30
    names = {"batch": "sequences that fit", "peak_gib": "peak (GiB)"}
    speeds = ["tokens a second", "tokens a second of the source", "times the source's", "times as long a token"]
    columns = [*speeds, *names.values(), "cache (GiB)"]
    rows = rows.sort_values("budget", ascending=False, kind="stable").rename(columns=names)
    return rows.drop_duplicates([*case, "budget", "method"]).set_index([*case, "budget", "method"])[columns]


def prefill_table(rows):
    """Reading a prompt: the source's seconds, and those of each method over them; one row a case and length."""
    case = [*MACHINE, "shape", "layers", "length"]
    seconds = rows.assign(column=method_and_budget(rows)).pivot(index=case, columns="column", values="seconds")
    table = seconds.div(seconds["source"], axis=0).drop(columns="source")
    table.insert(0, "source (s)", seconds["source"])
    return table.rename_axis(columns=None)


def without_what_is_the_same(table):
    """A table without the levels of its index that have one value."""
    return table.droplevel([name for name in table.index.names if table.index.unique(name).size == 1])


def low_rank_table(speeds):
    """Times as long as the source's that the attention over a low-rank cache takes: a row a model and load."""
    rows = named(speeds, "low_rank").query("method == 'low rank'")
    rows = rows.assign(slower=1 / rows["speedup"], cache=rows["budget"].map("{:.0%} of the cache".format))
    order = rows.sort_values("budget", ascending=False)["cache"].unique()
    return rows.pivot(index=["model", "batch", "context"], columns="cache", values="slower")[order].rename_axis(
        columns=None
    )


def by_budget(ratios):
    """“0.94 to 3.33 (50% of the heads), 1.41 to 4.06 (25%)” of ratios with `budget` in their index."""
    ranges = [f"{spread(own)} ({budget:.0%})" for budget, own in ratios.groupby("budget")][::-1]
    return ", ".join(ranges).replace("%)", "% of the heads)", 1)
