"""What the CSVs of `benchmarks/results/` say, as tables and figures: the paper's claims, and what goes beyond them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from scipy.stats import bootstrap, spearmanr

from .evaluation import interval
from .plots import COLORS, KIND_COLORS, plain_log

STEPS = {  # (method, allocation) of `benchmarks/training_free.py`
    ("mean", "uniform"): "GQA: neighbours, mean",
    ("spectral, standard planes", "uniform"): "spectral, standard planes",
    ("spectral", "uniform"): "+ free planes",
    ("spectral", "cost"): "+ searched groups, by energy",
    ("spectral", "loss"): "+ by measured loss",
    ("spectral, attention refitted", "loss"): "+ attention refitted",
    ("spectral, layers refitted", "loss"): "+ layers refitted",
}
MEASURES = ("weight_cka", "activation_cka", "cosine", "omega", "spectral")


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
    bound = 0.999 * rows["tokens"].max() / short  # a saving that large was cut off by the longest run
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


def rank_agreement(pairs, resamples=1000, seed=0):
    """Does a pair that is more alike cost less to fuse? −Spearman's ρ of similarity and measured rise, a row per measure.

    `pairs`: the rows of `benchmarks/similarity.py`, all layers. Columns (kind, "ρ" | "low" | "high"): 1 would be the same
    order, 0 none; 95 % interval by bootstrap over the pairs.
    """
    table = {}
    for kind, chosen in pairs.groupby("kind"):
        for measure in MEASURES:
            data = (chosen[measure].to_numpy(), chosen["rise"].to_numpy())
            drawn = bootstrap(
                data,
                lambda similarity, rise: -spearmanr(similarity, rise).statistic,
                paired=True,
                vectorized=False,
                n_resamples=resamples,
                method="percentile",
                rng=seed,
            ).confidence_interval
            figures = {"ρ": -spearmanr(*data).statistic, "low": drawn.low, "high": drawn.high}
            table.setdefault(measure, {}).update({(kind, name): value for name, value in figures.items()})
    return pd.DataFrame(table).T


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


def with_steps(rows):
    """The rows of `benchmarks/training_free.py` that are a step of the ladder, named in a column `step`, in order."""
    steps = pd.Series(list(zip(rows["method"], rows["allocation"])), index=rows.index).map(STEPS)
    return rows.assign(step=pd.Categorical(steps, STEPS.values(), ordered=True)).dropna(subset="step").sort_values("step")


def low_rank(rows):
    """Perplexity of the low-rank caches, the better allocation of ranks, by budget and seed."""
    return rows[rows["method"] == "low rank"].groupby(["budget", "seed"])["perplexity"].min()


def against_low_rank(rows):
    """The last step of the ladder against a low-rank cache of the same size: a row per budget, interval over the draws."""
    best = rows[rows["method"] == "spectral, layers refitted"].set_index(["budget", "seed"])["perplexity"]
    baseline, table = low_rank(rows), {}
    for budget, ratios in (best / baseline).dropna().groupby("budget"):
        mean, low, high = interval(ratios)
        figures = {"DHA": best[budget].mean(), "low rank": baseline[budget].mean()}
        word = verdict(1 - high, 1 - low)
        table[budget] = figures | {"DHA / low rank": mean, "low": low, "high": high, "DHA is lower": word}
    return pd.DataFrame(table).T.rename_axis("budget").sort_index(ascending=False)


def ladder(rows, title):
    """Perplexity from mean pooling to the best, step by step: a line per head budget, mean and range over the draws.

    `rows`: of `benchmarks/training_free.py`; the low-rank caches of the same size are dashed lines.
    """
    figure, axis = plt.subplots(figsize=(9.5, 5), layout="constrained")
    budgets = sorted(rows["budget"].unique(), reverse=True)
    names = [f"{budget:.0%}" for budget in budgets]
    sns.pointplot(
        with_steps(rows).assign(budget=lambda steps: steps["budget"].map("{:.0%}".format)),
        x="perplexity",
        y="step",
        hue="budget",
        hue_order=names,
        palette=COLORS[: len(budgets)],
        markers=list("osD^v")[: len(budgets)],
        errorbar=("pi", 100),
        ax=axis,
    )
    baseline = low_rank(rows).groupby("budget").mean()
    for budget, name, color in zip(budgets, names, COLORS):
        axis.axvline(baseline[budget], color=color, linestyle="--", label=f"low rank, {name}")
    axis.axvline(rows["base_perplexity"].mean(), color="black", linestyle=":", label="source")
    axis.set(title=title, xlabel="validation perplexity (log scale; lower is better)", xscale="log", ylabel=None)
    plain_log(axis.xaxis)
    axis.legend(title="heads kept", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def growth(costs):
    """How seconds and memory grow with each dimension of a random model: the exponent of a power law through its cases.

    `costs`: rows of `benchmarks/conversion_cost.py`, one size of text.
    """
    table = {}
    for dimension in ("layers", "heads", "hidden"):
        cases = costs[costs["case"].str.startswith((dimension, "base"))]
        total = cases.groupby(dimension).agg(seconds=("seconds", "sum"), peak_mib=("peak_mib", "max"))
        sizes = np.log(total.index.to_numpy(dtype=float))
        table[dimension] = {column: np.polyfit(sizes, np.log(total[column]), 1)[0] for column in total}
    return pd.DataFrame(table).T.rename_axis("grows with")
