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


def attention_speedups():
    """How many times as fast as the source's a layer's attention is in a decoding step: by shape, batch, context, budget.

    On two cores with AVX2, the slower ones of those that were measured. A column a method; "source, our code" has all heads
    of the source in this project's attention, and "source (ms)" is what transformers' own takes.
    """
    rows = pd.read_csv(RESULTS / "decode.csv").query("threads == 2 and processor == 'AVX2' and dtype == 'float32'")
    case, fewer = ["shape", "batch", "context"], rows["budget"] < 1
    kept = rows[fewer & rows["part"].isin(["attention", "low_rank"])]
    methods = kept.pivot(index=[*case, "budget"], columns="method", values="speedup")
    all_heads = rows[~fewer & rows["part"].eq("attention")].pivot(index=case, columns="method")
    control, source = all_heads["speedup", "source, our code"], all_heads["seconds", "source"] * 1000
    return methods.join(control.rename("source, our code")).join(source.rename("source (ms)"))


def speed_near(speedups, shape, batch, context, budget):
    """(times as fast as transformers' source, batch, context): of the nearest sizes that were measured.

    Between the measured budgets it is interpolated, all heads being the source in this project's code; below them NaN.
    """
    measured, own = (speedups.loc[shape, name].unstack("budget").sort_index(axis=1) for name in ("DHA", "source, our code"))
    sizes = np.array(list(measured.index))
    nearest = np.abs(np.log(sizes / [batch, context])).sum(1).argmin()
    line = [*measured.iloc[nearest], own.iloc[nearest].mean()]
    return float(np.interp(budget, [*measured.columns, 1.0], line, left=np.nan)), *map(int, sizes[nearest])
