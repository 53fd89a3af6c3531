"""What `benchmarks/paper_claims.py` measured: the paper's claims, with a verdict for each."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from .evaluation import interval
from .plots import COLORS, KIND_COLORS, plain_log


def verdict(low, high, needed=0.0):
    """ "holds" if the whole interval lies above what is needed, "does not hold" if below, else "cannot be told"."""
    if low > needed:
        return "holds"
    return "does not hold" if high < needed else "cannot be told"


def gains(rows, better, worse, budget, tokens):
    """ln(perplexity of `worse` / perplexity of `better`) seed by seed, at one head budget and number of tokens."""

    def losses(method):
        chosen = rows[(rows["method"] == method) & (rows["tokens"] == tokens)]
        if method != "source":
            chosen = chosen[np.isclose(chosen["budget"], budget)]
        return np.log(chosen.set_index("seed")["perplexity"])

    return (losses(worse) - losses(better)).dropna()


def at_best_rate(rows):
    """Each method at each budget and number of tokens with the learning rate that gives it the lowest mean over seeds."""
    case = ["method", "budget", "tokens"]
    mean = rows.groupby([*case, "learning_rate"])["perplexity"].transform("mean")
    best = mean.groupby([rows[column] for column in case]).transform("min")
    return rows[mean == best]


def trained_by_all(rows):
    """The most training tokens for which no method lacks a run, at any budget or with any seed."""
    runs = rows[rows["tokens"] > 0].groupby("tokens").size()
    return int(runs[runs == runs.max()].index.max())


def token_savings(rows, better, worse, budget, tokens):
    """How many times the tokens `worse` needs for what `better` reaches after `tokens`, seed by seed.

    Read off the line between the measured points of `worse` over ln(tokens), each the best so far; where even the longest
    run is not as good, the factor up to there, which is then a lower bound.
    """
    savings = {}
    at_budget = rows[np.isclose(rows["budget"], budget) & (rows["tokens"] > 0)]
    for seed, run in at_budget.groupby("seed"):
        reached = run[(run["method"] == better) & (run["tokens"] == tokens)]["perplexity"]
        line = run[run["method"] == worse].sort_values("tokens")
        if len(reached) and len(line):
            best = line["perplexity"].cummin()[::-1]
            needed = np.interp(np.log(reached.iloc[0]), np.log(best), np.log(line["tokens"][::-1]))
            savings[seed] = float(np.exp(needed) / tokens)
    return pd.Series(savings)


def heads_by_layer(rows, method, budget):
    """[seeds, layers, 2]: the key and value heads that each layer of a method keeps."""
    chosen = rows[(rows["method"] == method) & np.isclose(rows["budget"], budget)]
    return np.array([[list(map(int, layer.split("+"))) for layer in plan.split()] for plan in chosen["heads_by_layer"]])


def paper_verdicts(rows, budget, tokens, short):
    """The paper's claims against the rows of `benchmarks/paper_claims.py`: a table with figure, interval and verdict.

    `tokens`: after how many to compare; `short`: the fewer at which DHA has to be where GQA is after 5 times as many.
    """
    plans = heads_by_layer(rows[rows["tokens"] == tokens], "DHA", budget)
    keys, values = plans[..., 0], plans[..., 1]
    half = plans.shape[1] // 2
    early, late = plans[:, :half].mean((1, 2)), plans[:, plans.shape[1] - half :].mean((1, 2))

    def compare(better, worse):
        return gains(rows, better, worse, budget, tokens) * 100

    quality = 100 * np.exp(gains(rows, "DHA", "source", budget, tokens))
    savings = token_savings(rows, "DHA", "GQA", budget, short)
    longest = rows.loc[rows["method"] == "GQA", "tokens"].max()
    bound = 0.999 * longest / short  # a saving that large was cut off by the longest run
    lower = "lower perplexity (%)"
    claims = [
        ("97.6 % of the source's quality", "source's perplexity over DHA's (%)", 97.6, quality),
        ("GQA's loss with 5 times fewer tokens", f"times the tokens, from {short:,}", 5, savings),
        ("the layout alone beats GQA", lower, 0, compare("DHA layout, mean-pooled neighbours", "GQA")),
        ("groups by CKA gain GQA nothing", "higher perplexity (%), above -1", -1, compare("GQA", "GQA, groups by CKA")),
        ("learned fusion matters", lower, 0, compare("DHA", "DHA without learned fusion")),
        ("adaptive allocation matters", lower, 0, compare("DHA", "DHA without adaptive allocation")),
        ("more key than value heads", "key heads less value heads a layer", 0, (keys - values).mean(1)),
        ("early layers keep more", "heads a layer, first half less second", 0, early - late),
    ]
    table = []
    for claim, figure, needed, measured in claims:
        mean, low, high = interval(measured)
        word = verdict(low, high, needed)
        if measured is savings and word != "holds" and measured.max() >= bound:
            word = "cannot be told"
        table.append([claim, figure, needed, mean, low, high, len(measured), word])
    columns = ["the paper says", "measured as", "needed", "mean", "low", "high", "seeds", "here"]
    return pd.DataFrame(table, columns=columns).set_index("the paper says")


def study_lines(rows, title):
    """Perplexity over training tokens, a line per method with the range over seeds; one panel per head budget.

    `rows`: columns method, budget, tokens, seed, perplexity; the source (budget 1) stands in every panel.
    """
    budgets = sorted(set(rows["budget"]) - {1.0}, reverse=True)
    figure, axes = plt.subplots(1, len(budgets), figsize=(6.5 * len(budgets), 5.2), sharey=True, layout="constrained")
    methods = list(dict.fromkeys(rows["method"]))
    style = {
        "hue_order": methods,
        "style_order": methods,
        "markers": True,
        "dashes": False,
        "palette": COLORS[: len(methods)],
    }
    for axis, budget in zip(np.atleast_1d(axes), budgets):
        chosen, last = rows[rows["budget"].isin([budget, 1.0])], budget == budgets[-1]
        columns = {"x": "tokens", "y": "perplexity", "hue": "method", "style": "method"}
        sns.lineplot(chosen, **columns, **style, errorbar=("pi", 100), ax=axis, legend=last)
        axis.set(title=f"{budget:.0%} of the heads", xlabel="training tokens, search included")
        axis.set(ylabel="validation perplexity (log scale)", yscale="log")
        axis.set_xscale("symlog", linthresh=chosen.loc[chosen["tokens"] > 0, "tokens"].min())
        plain_log(axis.yaxis)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    return figure


def layer_heads(plans, title):
    """Key and value heads over the layers, mean and range over seeds; a panel per item of {name: [seeds, layers, 2]}."""
    figure, axes = plt.subplots(1, len(plans), figsize=(5 * len(plans), 3.6), sharey=True, layout="constrained")
    for axis, (name, heads) in zip(np.atleast_1d(axes), plans.items()):
        for kind, marker in ((0, "o"), (1, "s")):
            label, layers = ("key", "value")[kind], np.arange(heads.shape[1])
            axis.plot(layers, heads[..., kind].mean(0), marker=marker, label=f"{label} heads", color=KIND_COLORS[label])
            low, high = heads[..., kind].min(0), heads[..., kind].max(0)
            axis.fill_between(layers, low, high, alpha=0.2, color=KIND_COLORS[label])
        axis.set(title=f"budget {name}", xlabel="layer", ylabel="heads kept", ylim=(0, None))
    axis.legend()
    figure.suptitle(title)
    return figure
