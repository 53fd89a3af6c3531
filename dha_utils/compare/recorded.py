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

    All have read the same number of tokens, the most that is recorded for all of them. Each is the better of its
    allocations, a mean over the draws of the text. The table is empty if nothing is recorded.
    """
    path = RESULTS / f"training_free_{model}.csv"
    rows = pd.read_csv(path).query("text == @text and method in @RIVALS") if path.is_file() else pd.DataFrame()
    if rows.empty:
        return pd.DataFrame(columns=list(RIVALS.values())), 0
    by = ["calibration_tokens", "budget", "method", "allocation"]
    means = rows.groupby(by)["ratio"].mean().groupby(by[:3]).min().unstack()[list(RIVALS)]
    tokens = means.dropna().index.get_level_values(0).max()
    return means.loc[tokens].sort_index(ascending=False).rename(columns=RIVALS).rename_axis(columns=None), int(tokens)


def attention_times():
    """Seconds of one layer's attention over its cache in a decoding step, on two cores, by shape, batch, context, budget.

    A column a method: "source" is transformers' own, "source, our code" the same heads in this project's attention.
    """
    rows = pd.read_csv(RESULTS / "decode.csv").query("part == 'attention' and threads == 2")
    return rows.pivot(index=["shape", "batch", "context", "budget"], columns="method", values="seconds")


def speed_near(times, shape, batch, context, budget):
    """(times as fast as transformers' source, measured batch, measured context): the nearest sizes that were measured."""
    ratio = (times["source"] / times["DHA"]).loc[shape].unstack("budget")
    sizes = np.array(list(ratio.index))
    nearest = np.abs(np.log(sizes / [batch, context])).sum(1).argmin()
    measured = ratio.iloc[nearest].sort_index()
    return float(np.interp(budget, [*measured.index, 1.0], [*measured, 1.0])), *map(int, sizes[nearest])
