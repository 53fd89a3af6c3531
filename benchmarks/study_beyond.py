"""What goes beyond the paper, from the CSVs of `benchmarks/results/`: similarity, fusion, recovery, cost."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from readme import spread
from study_claims import at_best_rate, budget_points, verdict

from dha_utils.measure.perplexity import interval
from dha_utils.plots import COLORS, plain_log

STEPS = {  # (method, allocation) of `benchmarks/training_free.py`
    ("mean", "uniform"): "GQA: neighbours, mean",
    ("spectral, standard planes", "uniform"): "spectral, standard planes",
    ("spectral", "uniform"): "+ free planes",
    ("spectral", "cost"): "+ searched groups, by energy",
    ("spectral", "loss"): "+ by measured loss",
    ("spectral", "refit"): "+ allocated for the refit",
    ("spectral, attention refitted", "refit"): "+ attention refitted",
    ("spectral, layers refitted", "refit"): "+ layers refitted",
}
DRAW = ["budget", "calibration_tokens", "seed"]  # what the rows of one calibration draw share


def with_steps(rows):
    """The rows of `benchmarks/training_free.py` that are a step of the ladder, named in a column `step`, in order."""
    steps = pd.Series(list(zip(rows["method"], rows["allocation"])), index=rows.index).map(STEPS)
    rows = rows.assign(step=pd.Categorical(steps, STEPS.values(), ordered=True)).dropna(subset="step").sort_values("step")
    return rows.assign(step=rows["step"].cat.remove_unused_categories())


def step_table(rows):
    """Mean perplexity over the draws: a row per step of the ladder, a column per head budget, the largest first."""
    table = with_steps(rows).pivot_table(index="step", columns="budget", values="perplexity", observed=True)
    return table.sort_index(axis=1, ascending=False)


def every_way(rows):
    """Mean perplexity and its range over the draws: a row per method, allocation and size of text, a column per budget."""
    rows = rows.sort_values("calibration_tokens", kind="stable")
    values = rows.groupby(["calibration_tokens", "method", "allocation", "budget"], sort=False)["perplexity"]
    return values.agg(spread).unstack("budget").sort_index(axis=1, ascending=False).fillna("")


def step_gains(rows):
    """What each step multiplies the perplexity by, against the one measured before it on the same draw; mean over draws."""
    losses = with_steps(rows).pivot_table(index="step", columns=["budget", "seed"], values="perplexity", observed=True)
    gains = (losses / losses.shift()).reindex(list(STEPS.values())[1:])
    return gains.T.groupby("budget").mean().T.sort_index(axis=1, ascending=False)


REFITTED = "{}, layers refitted".format
RIVALS = {  # (shared heads, low-rank cache)
    "neither refitted": ("spectral", "low rank"),
    "shared heads refitted": (REFITTED("spectral"), "low rank"),
    "both refitted": (REFITTED("spectral"), REFITTED("low rank")),
}


def low_rank(rows, method="low rank"):
    """Perplexity of the low-rank caches, the better allocation of ranks, by `DRAW`."""
    return rows[rows["method"] == method].groupby(DRAW)["perplexity"].min()


def against_low_rank(rows):
    """Shared heads against a low-rank cache of the same size, made from the same text: as `RIVALS` says.

    A row per head budget, size of the text and step of `RIVALS`; 95 % interval of the ratio over the draws.
    """
    table, cases = {}, DRAW[:2]
    for step, (ours, theirs) in RIVALS.items():
        shared = rows[(rows["method"] == ours) & (rows["allocation"] == "refit")].rename(columns={"perplexity": "DHA"})
        pairs = shared.merge(low_rank(rows, theirs).rename("low rank"), on=DRAW)
        for case, pair in pairs.groupby(cases):
            mean, low, high = interval(pair["DHA"] / pair["low rank"])
            figures = {"DHA / low rank": mean, "low": low, "high": high, "draws": len(pair)}
            figures = dict(pair[["DHA", "low rank"]].mean()) | figures
            table[(*case, step)] = figures | {"DHA is lower": verdict(1 - high, 1 - low)}
    table = pd.DataFrame.from_dict(table, orient="index").rename_axis([*cases, "step"])
    return table.sort_index(level=[0, 1], ascending=[False, True], sort_remaining=False, kind="stable")


def ladder(rows, title):
    """Perplexity from mean pooling to the best, step by step, and of low-rank caches: mean and range over the draws.

    `rows`: of `benchmarks/training_free.py`, one size of text; a colour per head budget.
    """
    figure, axis = plt.subplots(figsize=(9.5, 5), layout="constrained")
    rivals = {"low-rank cache of the same size": "low rank", "the same, refitted": REFITTED("low rank")}
    rivals = pd.concat([low_rank(rows, method).reset_index().assign(step=name) for name, method in rivals.items()])
    steps = with_steps(rows)
    order = [*steps["step"].cat.categories, *rivals["step"].unique()]
    budget_points(pd.concat([steps, rivals]), "step", axis, order=order, linestyle="none", dodge=0.3)
    axis.axhline(len(steps["step"].cat.categories) - 0.5, color="0.6", linewidth=1)
    axis.axvline(rows["base_perplexity"].mean(), color="black", linestyle=":", label="source")
    axis.set(title=title, xlabel="validation perplexity (log scale; lower is better)", xscale="log", ylabel=None)
    plain_log(axis.xaxis)
    axis.legend(title="heads kept", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def rival_dots(versus, title):
    """The ratios of `against_low_rank` with their 95 % intervals, a row per case of the table's index."""
    figure, axis = plt.subplots(figsize=(9.5, 0.4 * len(versus) + 1.6), layout="constrained")
    names = [f"{model}, {budget:.3g}, {tokens:,} tokens, {step}" for model, budget, tokens, step in versus.index]
    heights, mean = np.arange(len(versus))[::-1], versus["DHA / low rank"]
    whiskers = np.clip([mean - versus["low"], versus["high"] - mean], 0, 0.5)  # of two draws, some have no end
    axis.errorbar(mean, heights, xerr=whiskers, fmt="o", color=COLORS[0], capsize=4)
    axis.axvline(1, color="black", linestyle="--")
    axis.set(title=title, xlabel="perplexity of shared heads over that of the low-rank cache (below 1: shared heads win)")
    axis.set_yticks(heights, names)
    return figure


def decode_lines(times, title):
    """A decoding step over the source's, [context, method]: a line per method of `benchmarks/decode.py`."""
    figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
    sns.lineplot(times, markers=True, ax=axis)
    axis.axhline(1, color="black", linestyle="--")
    axis.set(title=title, xlabel="context (tokens)", ylabel="time of the source's step", xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        plain_log(side)
    axis.legend()
    return figure


def ways(rows):
    """The rows of `benchmarks/recovery.py` with a column `method` that names start, loss and what was trained.

    Of each, the runs at the learning rate that is best in the end, on the mean over the seeds.
    """
    losses = rows["loss"].map({"distil": "distilled", "lm": "LM loss"})
    rows = rows.assign(method=rows["start"] + ", " + losses + ", " + rows["trainable"])
    best = at_best_rate(rows[rows["tokens"] == rows["total_tokens"]])
    return rows.merge(best[["method", "budget", "total_tokens", "learning_rate"]].drop_duplicates())


def recovery_table(rows):
    """Each way to recover after equal tokens and after equal seconds (those of the quickest), mean and range over seeds.

    `rows`: of `ways`, of one model and one number of tokens, with the source as it was and with the same of its weights
    trained on the same tokens. The loss after equal seconds is read off the line between its measured points.
    """
    control, rows = (rows[chosen] for chosen in (rows["start"] == "source", rows["start"] != "source"))
    source = control.loc[control["tokens"] == 0, "perplexity"].mean()
    trained = control[control["tokens"] == control["total_tokens"]].groupby("trainable")["perplexity"].mean()
    quickest, table = rows["seconds"].min(), {}
    for (budget, method), chosen in rows.groupby(["budget", "method"]):
        runs = [run.sort_values("tokens") for _, run in chosen.groupby("seed")]
        last = np.array([run["perplexity"].iloc[-1] for run in runs])
        timed = [
            np.exp(
                np.interp(quickest / run["seconds"].iloc[0], run["tokens"] / run["tokens"].max(), np.log(run["perplexity"]))
            )
            for run in runs
        ]
        table[f"{budget:.1%}", method] = {
            "start": np.mean([run["perplexity"].iloc[0] for run in runs]),
            "after all tokens": last.mean(),
            "lowest": last.min(),
            "highest": last.max(),
            "over the source": last.mean() / source,
            "over it trained alike": last.mean() / trained[chosen["trainable"].iloc[0]],
            "seeds": len(runs),
            "seconds": chosen["seconds"].mean(),
            f"after {quickest:,.0f} s": np.mean(timed),
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(["budget", "way"])


def beside_gqa(claims, here):
    """What GQA has after N tokens, and what another way has after N/20 or fewer: a row per N, mean and worst case.

    `claims`: of `benchmarks/paper_claims.py`, one head budget and the source, which stands there trained as GQA was;
    `here`: columns tokens and perplexity of the other way, a row per seed, on the same validation text. The verdict holds
    where the worst seed here is lower than the best of GQA.
    """
    table = {}
    for tokens, rows in claims[claims["tokens"] > 0].groupby("tokens"):
        gqa, source = (rows.loc[rows["method"] == method, "perplexity"] for method in ("GQA", "source"))
        used = here.loc[here["tokens"] <= tokens / 20, "tokens"].max()
        ours = here.loc[here["tokens"] == used, "perplexity"]
        table[tokens] = {"GQA": gqa.mean(), "lowest": gqa.min(), "source": source.mean()}
        table[tokens] |= {"tokens here": used, "here": ours.mean(), "highest here": ours.max()}
        table[tokens]["here is lower"] = verdict(gqa.min() - ours.max(), gqa.max() - ours.min())
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("tokens of GQA")
