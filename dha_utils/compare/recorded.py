"""What the scripts of `benchmarks/` have recorded, to stand beside what a notebook measures."""

import numpy as np
import pandas as pd

from ..runs import ROOT

RESULTS = ROOT / "benchmarks" / "results"
# Names of `training_free.py`
RIVALS = {
    "low rank": "low rank",
    "low rank, layers refitted": "low rank, refitted",
    "spectral, layers refitted": "DHA, refitted",
}


def recorded_rivals(model, text):
    """(perplexities over the source's, calibration tokens) of `RIVALS` on this checkpoint and text: a row a budget.

    All have read the same number of tokens, the number of which most budgets are recorded for all of them. Each is the
    better of its allocations, a mean over the draws of the text. The table is empty if they have nothing in common.
    """
    path = RESULTS / f"training_free_{model}.csv"
    rows = pd.read_csv(path).query("text == @text and method in @RIVALS") if path.is_file() else pd.DataFrame()
    by = ["calibration_tokens", "budget", "method", "allocation"]
    if not rows.empty:
        rows = rows.groupby(by)["ratio"].mean().groupby(by[:3]).min().unstack().reindex(columns=list(RIVALS)).dropna()
    if rows.empty:
        return pd.DataFrame(columns=list(RIVALS.values())), 0
    tokens = rows.groupby(level=0).size()[::-1].idxmax()
    return rows.loc[tokens].sort_index(ascending=False).rename(columns=RIVALS).rename_axis(columns=None), int(tokens)


def attention_times():
    """Seconds of one layer's attention over its cache in a decoding step, on two cores, by shape, batch, context, budget.

    A column a method: "source" is transformers' own, "source, our code" the same heads in this project's attention.
    """
    rows = pd.read_csv(RESULTS / "decode.csv").query(
        "part == 'attention' and threads == 2 and device == 'cpu' and dtype == 'float32'"
    )
    return rows.pivot(index=["shape", "batch", "context", "budget"], columns="method", values="seconds")


def speed_near(times, shape, batch, context, budget):
    """(times as fast as transformers' source, batch, context): of the nearest sizes that were measured.

    Between the measured budgets it is interpolated, all heads being the source in this project's code; below them NaN.
    """
    ratios = {name: (times["source"] / times[name]).loc[shape].unstack("budget") for name in ("DHA", "source, our code")}
    sizes = np.array(list(ratios["DHA"].index))
    nearest = np.abs(np.log(sizes / [batch, context])).sum(1).argmin()
    measured, own = (ratio.iloc[nearest].sort_index() for ratio in ratios.values())
    return float(np.interp(budget, [*measured.index, 1.0], [*measured, own.mean()], left=np.nan)), *map(int, sizes[nearest])
