"""Tables and charts of `notebooks/studies/speed_and_memory`: what decoding costs, measured and predicted from bytes."""

import matplotlib.pyplot as plt

from dha_utils.compare.decoding import CACHE_MOVES
from dha_utils.plots import COLORS, plain_log

MACHINE = ["dtype", "device", "threads"]
CASE = ["part", *MACHINE, "shape", "layers", "budget", "batch", "context"]
METHODS = ["source, our code", "GQA", "DHA", "low rank"]


def moved_bytes(rows):
    """Bytes that one step moves, at least: the weights and the cache are read; `generate` also copies the cache, to which
    a `DynamicCache` appends by writing it anew; keys that are rebuilt are written and read."""
    moves = rows["part"].eq("attention").map({True: 1, False: CACHE_MOVES})
    return rows["weight_bytes"] + moves * rows["cache_bytes"] + 2 * rows["rebuilt_bytes"]


def speedups(rows):
    """How many times as fast as the source each method takes the step of each case: measured, quartiles, predicted.

    The quartiles are those of the method's own seconds, against the source's median.
    """
    rows = rows[rows["part"] != "throughput"].assign(moved=moved_bytes)
    source = rows[rows["method"] == "source"].set_index(CASE)[["seconds", "moved"]].add_prefix("source_")
    rows = rows[rows["method"] != "source"].join(source, on=CASE)
    for name, measured in (("measured", "seconds"), ("low", "high"), ("high", "low")):
        rows[f"{name}_speedup"] = rows["source_seconds"] / rows[measured]
    rows["predicted_speedup"] = rows["source_moved"] / rows["moved"]
    return rows.set_index([*CASE, "method"])[[f"{n}_speedup" for n in ("measured", "low", "high", "predicted")]]


def speedup_chart(speeds, title):
    """`speedups` of one part and machine, a panel a budget: filled what was measured (with quartiles), hollow predicted."""
    budgets = sorted(speeds.index.unique("budget"), reverse=True)
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(12, 8.3), sharey=True, sharex=True, squeeze=False, layout="constrained"
    )
    rows = speeds.reset_index().sort_values(["shape", "batch", "context"])
    sizes = zip(rows["batch"], rows["context"])
    rows["case"] = rows["shape"] + [f", batch {batch}, context {context}" for batch, context in sizes]
    if "dtype" in rows:
        rows["case"] += "\n(" + rows["layers"].astype(str) + " layers, " + rows["dtype"] + ")"
    cases = list(dict.fromkeys(rows["case"]))  # of all budgets: the panels share an axis
    for axis, budget in zip(axes[0], budgets):
        chosen = rows[rows["budget"] == budget]
        for offset, (method, color) in enumerate(zip(METHODS, COLORS)):
            own = chosen[chosen["method"] == method]
            height = own["case"].map(cases.index).astype(float) + 0.2 * (offset - 1.5)
            spread = [own["measured_speedup"] - own["low_speedup"], own["high_speedup"] - own["measured_speedup"]]
            axis.errorbar(own["measured_speedup"], height, xerr=spread, fmt="o", color=color, label=method)
            axis.scatter(own["predicted_speedup"], height, facecolor="none", edgecolor=color, s=60)
        axis.axvline(1, color="black", linestyle="--")
        axis.set(title=f"{budget:.0%} of the cache", xlabel="times as fast (log scale)", xscale="log")
        axis.set_yticks(range(len(cases)), cases)
        plain_log(axis.xaxis)
    axes[0, 0].invert_yaxis()
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, title="measured (hollow: predicted from bytes)", loc="outside lower center", ncols=len(METHODS))
    figure.suptitle(title)
    return figure


def throughput_table(rows):
    """Tokens a second with the largest batch that fits into the memory, one row a case and method."""
    case = [*MACHINE, "shape", "layers", "context", "memory_gib", "budget"]
    rows = rows[rows["part"] == "throughput"].reset_index(drop=True)
    rows["tokens a second"] = rows["batch"] * rows["new_tokens"] / rows["seconds"]
    source = rows[rows["method"] == "source"].set_index(case)["tokens a second"]
    rows["times the source's"] = rows["tokens a second"] / rows.join(source.rename("source"), on=case)["source"]
    rows["cache (GB)"] = rows["cache_bytes"] / 1e9
    names = {"batch": "sequences that fit", "peak_gib": "peak memory (GiB)"}
    columns = [*names.values(), "cache (GB)", "tokens a second", "times the source's"]
    return rows.rename(columns=names).set_index([*case, "method"])[columns]


def prefill_table(rows):
    """Seconds to the first token over the source's, one row a case, by length of the prompt."""
    seconds = rows.pivot(index=[*MACHINE, "shape", "layers", "budget", "length"], columns="method", values="seconds")
    return seconds.div(seconds["source"], axis=0)[[method for method in METHODS if method in seconds]]


def cases(speeds, part):
    """`speedups` of one part, without what is the same in all of its rows."""
    chosen = speeds.xs(part, level="part")
    return chosen.droplevel([name for name in (*MACHINE, "layers") if chosen.index.unique(name).size == 1])


def speed_range(speeds, budget):
    """“1.25 to 3.33”: how many times as fast as the source DHA is, over the `cases` of a budget."""
    measured = speeds.xs("DHA", level="method").xs(budget, level="budget")["measured_speedup"]
    return f"{measured.min():.2f} to {measured.max():.2f}"


def in_memory(throughput, budget):
    """What the larger batch of DHA gives in the same memory, the end of a sentence; nothing where it was not measured."""
    rows = throughput[throughput.index.get_level_values("budget") == budget].groupby("method").first()
    if rows.empty:
        return ""
    fits, times = rows["sequences that fit"], rows.loc["DHA", "times the source's"]
    batches = f"{fits['DHA']:.0f} sequences instead of {fits['source']:.0f}, of one shape"
    return f"; in the same memory for weights and cache, {times:.2f} times as many tokens a second ({batches})"
