"""README's tables and chart, from the CSVs of `training_free.py` and `recovery.py` on smollm2-135m, and of `decode.py`.

python benchmarks/readme.py           # the tables, to standard output
python benchmarks/readme.py --chart   # results/readme.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from dha_utils.plots import COLORS

RESULTS = Path(__file__).parent / "results"
WAYS = {  # (method, allocation) of training_free.py, each on its longest calibration text
    ("mean", "uniform"): "mean pooling (GQA)",
    ("low rank", "uniform"): "low-rank cache",
    ("low rank, layers refitted", "uniform"): "low-rank cache, refitted",
    ("spectral", "refit"): "DHA, closed form",
    ("spectral, layers refitted", "refit"): "DHA, closed form and refit",
}
POOLED = WAYS["mean", "uniform"]
TRAINED = 102400  # tokens
LINES = ("0.6", "0.35", COLORS[1], COLORS[0])  # of the chart, in the order of `WAYS` from the low-rank cache on


def figures():
    """(the rows of `WAYS`, one per calibration draw and budget, with their `way`; the perplexity of the source).

    Each on its longest text of which all budgets are there.
    """
    rows = pd.read_csv(RESULTS / "training_free_smollm2-135m.csv")
    rows["way"] = pd.Series(list(zip(rows["method"], rows["allocation"])), rows.index).map(WAYS)
    rows = rows.dropna(subset="way")
    tried = rows.groupby(["way", "calibration_tokens"])["budget"].transform("nunique")
    rows = rows[tried == rows["budget"].nunique()]
    rows = rows[rows["calibration_tokens"] == rows.groupby("way")["calibration_tokens"].transform("max")]
    return rows, rows["base_perplexity"].iloc[0]


def by_way(rows):
    """{way: its rows} in the order of `WAYS`; of a way that has read less text than most, the name says on how much."""
    named, most = {}, rows["calibration_tokens"].max()
    for way in WAYS.values():
        own = rows[rows["way"] == way]
        read = own["calibration_tokens"].max()
        less = read < most and way != POOLED  # which reads no text
        named[f"{way} (on {read:,} tokens)" if less else way] = own
    return named


def trained():
    """By budget, after `TRAINED` tokens on the LM loss: perplexity over that of the source trained alike (seed means)."""
    rows = pd.read_csv(RESULTS / "recovery_smollm2-135m.csv")
    rows = rows[(rows["tokens"] == TRAINED) & (rows["loss"] == "lm") & (rows["trainable"] == "attention")]
    rows = rows[rows["total_tokens"] == TRAINED]
    means = rows.groupby(["start", "budget", "learning_rate"])["perplexity"].mean().droplevel("learning_rate")
    assert means.index.is_unique, "one learning rate only, or the best of each would have to be taken"
    return means["refitted"] / means["source"].item()


def spread(values, draws=0):
    """Mean and range in words; the mean alone where rounding leaves no range. Says if it is of fewer than `draws` draws."""
    low, high = f"{values.min():,.1f}", f"{values.max():,.1f}"
    said = [f"{low} to {high}"] * (low != high) + [f"{len(values)} of {draws} draws"] * (len(values) < draws)
    return f"{values.mean():,.1f}" + (f" ({', '.join(said)})" if said else "")


def table():
    """Markdown: mean and range over the calibration draws, a row per way, a column per budget."""
    rows, source = figures()
    budgets = sorted(rows["budget"].unique(), reverse=True)
    lines = ["| before training | " + " | ".join(f"{budget:.0%} of the cache" for budget in budgets) + " |"]
    lines += ["|---" * (len(budgets) + 1) + "|", "| source | " + " | ".join(f"{source:.1f}" for _ in budgets) + " |"]
    for way, own in by_way(rows).items():
        draws = 1 if way == POOLED else rows["seed"].nunique()
        cells = [spread(own.loc[own["budget"] == budget, "perplexity"], draws) for budget in budgets]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table():
    """Markdown: the attention of a decoding step with half of the cache beside the source's, a row a shape."""
    rows = pd.read_csv(RESULTS / "decode.csv").query(
        "part in ('attention', 'low_rank') and budget == 0.5 and dtype == 'float32'"
    )
    lines = ["| decoding over half of the cache: attention | loads | DHA, times as fast | low-rank cache, times as slow |"]
    lines.append("|---" * 4 + "|")
    for (shape, threads, processor), own in rows.groupby(["shape", "threads", "processor"]):
        dha, rank = (own.loc[own["method"] == name, "speedup"] for name in ("DHA", "low rank"))
        sizes = own.assign(tokens=own["batch"] * own["context"]).sort_values(["tokens", "batch"])
        loads = [f"{size.batch} × {size.context:,}" for size in (sizes.iloc[0], sizes.iloc[-1])]
        lines.append(
            f"| {shape}, {threads} core{'s' * (threads > 1)} with {processor} | {' to '.join(loads)} tokens "
            f"| {dha.min():.1f} to {dha.max():.1f} | {1 / rank.max():.0f} to {1 / rank.min():.0f} |"
        )
    return "\n".join(lines)


def chart():
    rows, source = figures()
    figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    ways = by_way(rows)
    pooled = ways.pop(POOLED).groupby("budget")["perplexity"].mean()[::-1] / source
    for (way, own), marker, color in zip(ways.items(), "v^so", LINES):
        ratio = own.groupby("budget")["perplexity"].mean() / source
        ratio.loc[1.0] = 1.0
        ratio = ratio.sort_index(ascending=False)
        axis.plot(ratio.index * 100, ratio, marker=marker, color=color, linewidth=2)
        label = way.replace(" (on", "\n(on")
        rise, va = (-0.02, "top") if "\n" in label else (0.03, "bottom")
        axis.text(ratio.index[-1] * 100 - 1.5, ratio.iloc[-1] + rise, label, va=va, color=color, fontsize=11)
    ratio = trained()
    axis.plot(ratio.index * 100, ratio, "*", color=COLORS[2], markersize=15)
    label = f"DHA and {TRAINED / 1e6:.1f} M tokens of training,\nover the source trained alike"
    look = {"va": "top", "ha": "right", "color": COLORS[2], "fontsize": 11}
    axis.text(ratio.index[0] * 100 + 1.5, ratio.iloc[0] - 0.2, label, **look)
    off = ", ".join(f"{times:,.0f}×" for times in pooled)
    axis.text(99, 3.55, f"Not on the chart: {POOLED}, at {off}", fontsize=10, color="0.35")
    axis.set(
        title="smollm2-135m: what a smaller KV cache costs",
        xlabel="KV cache kept (% of the source's)",
        ylabel="validation perplexity over the source's",
        xlim=(102, -2),
        ylim=(0.7, 3.7),
        xticks=[100, 67, 50, 33],
    )
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chart", action="store_true")
    if parser.parse_args().chart:
        chart().savefig(RESULTS / "readme.png", dpi=120)
    else:
        print(table(), speed_table(), sep="\n\n")


if __name__ == "__main__":
    main()
