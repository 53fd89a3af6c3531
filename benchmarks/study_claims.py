"""What `benchmarks/paper_claims.py` measured: the paper's claims, with a verdict for each."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from dha_utils.measure.perplexity import interval
from dha_utils.plots import COLORS, KIND_COLORS, plain_log

METHODS = (
    "GQA",
    "GQA, groups by CKA",
    "DHA layout, mean-pooled neighbours",
    "DHA without adaptive allocation",
    "DHA without learned fusion",
    "DHA",
    "spectral",
    "source",
)


def verdict(low, high, needed=0.0):
    """ "holds" if the whole interval lies above what is needed, "does not hold" if below, else "cannot be told"."""
    if low > needed:
        return "holds"
    return "does not hold" if high < needed else "cannot be told"


def gains(rows, better, worse, budget, tokens):
    """By how much the loss of `better` is lower than that of `worse`, nats a token: seed by seed, one budget and length."""

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


def complete_runs(rows):
    """What ran with every seed that `rows` has, each method at its best rate (`at_best_rate`), in order of `METHODS`."""
    seeds = rows.groupby(["method", "budget", "tokens", "learning_rate"])["seed"].transform("nunique")
    rows = at_best_rate(rows[seeds == rows["seed"].nunique()])
    return rows.sort_values("method", key=lambda names: names.map(METHODS.index), kind="stable")


def trained_by_all(rows):
    """The most training tokens for which no method lacks a run, at any budget or with any seed."""
    runs = rows[rows["tokens"] > 0].groupby("tokens").size()
    return int(runs[runs == runs.max()].index.max())


def token_savings(rows, better, worse, budget, tokens):
    """How many times the tokens `worse` needs for what `better` reaches after `tokens`, seed by seed.

    Read off the line between the measured points of `worse`, the untrained one among them, each the best so far; where even
    the longest run is not as good, the factor up to there, which is then a lower bound.
    """
    savings = {}
    for seed, run in rows[np.isclose(rows["budget"], budget)].groupby("seed"):
        reached = run[(run["method"] == better) & (run["tokens"] == tokens)]["perplexity"]
        line = run[run["method"] == worse].sort_values("tokens")
        if len(reached) and len(line):
            best = line["perplexity"].cummin()[::-1]
            savings[seed] = np.interp(np.log(reached.iloc[0]), np.log(best), line["tokens"][::-1]) / tokens
    return pd.Series(savings)


def heads_by_layer(rows, method, budget):
    """[seeds, layers, 2]: the key and value heads that each layer of a method keeps."""
    chosen = rows[(rows["method"] == method) & np.isclose(rows["budget"], budget)]
    return np.array([[list(map(int, layer.split("+"))) for layer in plan.split()] for plan in chosen["heads_by_layer"]])


def paper_verdicts(rows, budget, tokens):
    """The paper's claims against the rows of `benchmarks/paper_claims.py`: a table with figure, interval and verdict.

    `tokens`: after how many to compare. The saving of tokens is read at the fewest, where GQA's runs reach far beyond.
    """
    plans = heads_by_layer(rows[rows["tokens"] == tokens], "DHA", budget)
    keys, values = plans[..., 0], plans[..., 1]
    half = plans.shape[1] // 2
    early, late = plans[:, :half].mean((1, 2)), plans[:, plans.shape[1] - half :].mean((1, 2))

    compare = partial(gains, rows, budget=budget, tokens=tokens)
    quality = 100 * np.exp(compare("DHA", "source"))
    short = rows.loc[rows["tokens"] > 0, "tokens"].min()
    savings = token_savings(rows, "DHA", "GQA", budget, short)
    longest = rows.loc[rows["method"] == "GQA", "tokens"].max()
    bound = 0.999 * longest / short  # a saving that large was cut off by the longest run
    lower = "lower loss (nats a token)"
    claims = [
        ("97.6 % of the source's quality", "source's perplexity over DHA's (%)", 97.6, quality),
        ("GQA's loss with 5 times fewer tokens", f"times the tokens, from {short:,}", 5, savings),
        ("the layout alone beats GQA", lower, 0, compare("DHA layout, mean-pooled neighbours", "GQA")),
        ("groups by CKA gain GQA nothing", "higher loss (nats a token)", -0.01, compare("GQA", "GQA, groups by CKA")),
        ("learned fusion matters", lower, 0, compare("DHA", "DHA without learned fusion")),
        ("adaptive allocation matters", lower, 0, compare("DHA", "DHA without adaptive allocation")),
        ("more key than value heads", "key heads less value heads a layer", 0, (keys - values).mean(1)),
        ("early layers keep more", "heads a layer, first half less second", 0, early - late),
    ]
    table = []
    for claim, figure, needed, measured in claims:
        if not len(measured):
            continue  # its methods have not run
        mean, low, high = interval(measured)
        word = verdict(low, high, needed)
        if measured is savings and word != "holds" and measured.max() >= bound:
            word = "cannot be told"
        table.append([claim, figure, needed, mean, low, high, len(measured), word])
    columns = ["the paper says", "measured as", "needed", "mean", "low", "high", "seeds", "here"]
    return pd.DataFrame(table, columns=columns).set_index("the paper says")


def around(values):
    """(lowest, highest), with the mean between them in spite of rounding."""
    return min(values.min(), values.mean()), max(values.max(), values.mean())


def line_color(method):
    """Black for the source, colours for what is compared, grey for what only differs from it in a part."""
    chosen = {"source": "black", "GQA": COLORS[3], "DHA": COLORS[0], "spectral": COLORS[2]}
    parts = {"source,": "black", "distilled": COLORS[0], "LM loss": COLORS[1]}
    return chosen.get(method) or next((color for part, color in parts.items() if part in method), "0.65")


def study_lines(rows, title, logarithmic=True):
    """Perplexity over training tokens, a line per method with the range over seeds; one panel per head budget.

    A method has the same colour in every chart (`line_color`); markers tell apart those that share one.
    `rows`: columns method, budget, tokens, seed, perplexity; the source (budget 1) stands in every panel. Where they have
    a column text_tokens, runs beyond it have read the training text more than once.
    """
    budgets = sorted(set(rows["budget"]) - {1.0}, reverse=True)
    figure, axes = plt.subplots(1, len(budgets), figsize=(4 + 5 * len(budgets), 5.2), sharey=True, layout="constrained")
    methods, tokens = list(dict.fromkeys(rows["method"])), sorted(set(rows["tokens"]))
    style = {
        "hue_order": methods,
        "style_order": methods,
        "markers": True,
        "dashes": False,
        "palette": [line_color(method) for method in methods],
    }
    for axis, budget in zip(np.atleast_1d(axes), budgets):
        chosen, last = rows[rows["budget"].isin([budget, 1.0])], budget == budgets[-1]
        columns = {"x": "tokens", "y": "perplexity", "hue": "method", "style": "method"}
        sns.lineplot(chosen, **columns, **style, errorbar=around, err_style="bars", ax=axis, legend=last)
        if "text_tokens" in rows:
            axis.axvline(rows["text_tokens"].iloc[0], color="black", linestyle=":", label="one pass over the text")
        scale = " (log scale)" if logarithmic else ""
        axis.set(title=f"{100 * budget:.3g}% of the heads", xlabel=f"training tokens{scale}")
        axis.set(ylabel=f"validation perplexity{scale}")
        if logarithmic:
            axis.set_yscale("log")
            plain_log(axis.yaxis)
            axis.set_xscale("symlog", linthresh=max(tokens[1], 1))
            axis.set_xticks(tokens)
        else:
            axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.margins(x=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    return figure


def budget_points(rows, y, axis, **style):
    """Points of perplexity over the categories `y`, mean and range over the seeds, a colour and a marker per head budget.

    Returns {budget: (its name, its colour)}.
    """
    budgets = sorted(set(rows["budget"]), reverse=True)
    names = {budget: f"{100 * budget:.3g}%" for budget in budgets}
    sns.pointplot(
        rows.assign(budget=rows["budget"].map(names)),
        x="perplexity",
        y=y,
        hue="budget",
        hue_order=names.values(),
        palette=COLORS[: len(budgets)],
        markers=list("osD^v")[: len(budgets)],
        errorbar=("pi", 100),
        ax=axis,
        **style,
    )
    return {budget: (name, color) for (budget, name), color in zip(names.items(), COLORS)}


def method_points(rows, title):
    """The perplexity of each method at one number of tokens, mean and range over the seeds, a colour per head budget."""
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    budget_points(rows[rows["budget"] < 1], "method", axis, linestyle="none", dodge=0.3)
    control = rows.loc[rows["method"] == "source", "perplexity"]
    axis.axvspan(control.min(), control.max(), color="black", alpha=0.3, label="source, same tokens")
    axis.set(title=title, xlabel="validation perplexity (lower is better)", ylabel=None)
    axis.legend(title="heads kept", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def layer_heads(plans, title):
    """Key and value heads over the layers, mean and range over seeds; a panel per item of {name: [seeds, layers, 2]}."""
    figure, axes = plt.subplots(2, len(plans) // 2, figsize=(9, 6), sharex=True, sharey=True, layout="constrained")
    for axis, (name, heads) in zip(axes.flat, plans.items()):
        for kind, marker in ((0, "o"), (1, "s")):
            label, layers = ("key", "value")[kind], np.arange(heads.shape[1])
            axis.plot(layers, heads[..., kind].mean(0), marker=marker, label=f"{label} heads", color=KIND_COLORS[label])
            low, high = heads[..., kind].min(0), heads[..., kind].max(0)
            axis.fill_between(layers, low, high, alpha=0.2, color=KIND_COLORS[label])
        axis.set(title=name, xlabel="layer", ylabel="heads kept")
        axis.label_outer()
    axis.set_ylim(0, None)
    axis.legend()
    figure.suptitle(title)
    return figure
