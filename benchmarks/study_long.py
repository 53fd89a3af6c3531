"""Tables and charts of `notebooks/studies/long_context`: where fewer heads hurt first, and fewer bits beside them."""

import matplotlib.pyplot as plt
import seaborn as sns

from dha_utils.plots import COLORS, plain_log

TASKS = {  # of long_context.csv: what is tested, and what its `place` is
    "position": ("running text", "position in the text (tokens, log scale)"),
    "copy": ("a passage read before", "length of the passage that is repeated (tokens, log scale)"),
    "needle": ("a number named once", "where the number was named (share of the text)"),
}


def excess(rows):
    """What each model loses beside the source on the same text: `rows` of long_context.csv, with `source`, `excess` (nats a
    token), the `weight` of a row in a mean (of positions: their number) and, in words, its `calibration` (what it is
    trained on as well)."""
    key = ["task", "place", "draw"]
    source = rows[rows["stage"] == "source"][[*key, "loss"]].rename(columns={"loss": "source"})
    rows = rows[rows["stage"] != "source"].merge(source, on=key, validate="many_to_one")  # one setting, not two
    read = rows["repeated"].map({0.0: "running text", 0.25: "a quarter repeats"})
    rows = rows.assign(excess=rows["loss"] - rows["source"], calibration=read, weight=1.0)
    positions = rows["task"] == "position"
    places = sorted({*rows[positions]["place"], *rows["context"]})
    tokens = {place: end - place for place, end in zip(places, places[1:])}
    rows.loc[positions, "weight"] = rows[positions]["place"].map(tokens)
    return rows


def mean_excess(rows, by):
    """Mean `excess` a token, by columns of `excess(rows)`."""
    total = rows.assign(excess=rows["excess"] * rows["weight"]).groupby(by, sort=False)[["excess", "weight"]].sum()
    return total["excess"] / total["weight"]


def excess_table(rows):
    """Mean loss of the source and mean excess of each model: a row a task and place."""
    rows = excess(rows)
    table = rows.pivot_table(index=["task", "place"], columns=["budget", "stage"], values="excess", sort=False)
    table.insert(0, ("source", "loss (nats)"), rows.groupby(["task", "place"], sort=False)["source"].mean())
    return table


def repeats_table(rows):
    """Mean excess of the models that were made both ways: a row a budget, task and place (of running text the mean of all
    positions), a column a stage and calibration."""
    rows = excess(rows)
    rows = rows.assign(place=rows["place"].where(rows["task"] != "position", "all"))
    table = mean_excess(rows, ["budget", "task", "place", "stage", "calibration"])
    both = table.unstack("calibration", sort=False).dropna()
    return both.unstack("stage", sort=False).swaplevel(axis=1).sort_index(axis=1)


def excess_chart(rows, title, style="stage"):
    """`excess` over `place`, a panel a task: a colour a budget, dashed what is worse of a `style` ("stage" or
    "calibration"); bands from least to most."""
    rows = excess(rows).sort_values("budget", ascending=False, kind="stable")
    figure, axes = plt.subplots(1, len(TASKS), figsize=(13, 4.5), layout="constrained", sharey=True)
    named = rows.assign(**{"heads kept": rows["budget"].map("{:.0%}".format)})
    for axis, (task, (tested, place)) in zip(axes, TASKS.items()):
        own = named[named["task"] == task]
        lines = {
            "hue": "heads kept",
            "style": style,
            "style_order": sorted(rows[style].unique()),  # "recovered" and "a quarter repeats" come first
            "palette": COLORS[: rows["budget"].nunique()],
            "errorbar": ("pi", 100),
            "err_kws": {"alpha": 0.1},
        }
        sns.lineplot(own, x="place", y="excess", ax=axis, markers=True, legend=axis is axes[-1], **lines)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(title=tested, xlabel=place.replace(" (", "\n("), ylabel="loss beyond the source's (nats a token)")
        if task != "needle":
            axis.set_xscale("log")
        axis.set_xticks(own["place"].unique(), [f"{tick:,g}" for tick in own["place"].unique()])
        axis.tick_params(axis="x", which="major", rotation=45)
        axis.minorticks_off()
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    axes[-1].get_legend().remove()
    figure.suptitle(title)
    return figure


def bits_table(rows):
    """Perplexity and bytes of the cache (quantized_cache.csv) by share of heads and bits, and both over the source's."""
    table = rows.set_index(["budget", "bits"])[["perplexity", "cache_bytes"]].sort_index(ascending=False)
    source = table.loc[(1.0, 16)]
    return table.assign(**{f"{name}, times the source's": table[name] / source[name] for name in table})


def bits_chart(rows, title):
    """Perplexity over bytes of the cache, both over the source's: a line a share of the heads, a dot a number of bits."""
    table = bits_table(rows)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (budget, own), color, marker in zip(table.groupby("budget", sort=False), COLORS, "osD^v"):
        x, y = own["cache_bytes, times the source's"], own["perplexity, times the source's"]
        axis.plot(x, y, marker=marker, color=color, label=f"{budget:.0%}")
        for bits, across, up in zip(own.index.get_level_values("bits"), x, y):
            axis.annotate(f"{bits} bits", (across, up), xytext=(4, 6), textcoords="offset points", fontsize=9)
    axis.set(title=title, xscale="log")
    axis.set(
        xlabel="cache, times the source's (log scale, smaller to the right)",
        ylabel="perplexity, times the source's",
    )
    plain_log(axis.xaxis)
    axis.invert_xaxis()
    axis.margins(x=0.12, y=0.1)
    axis.legend(title="heads kept")
    return figure
