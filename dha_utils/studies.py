"""What the CSVs of `benchmarks/results/` say: intervals over seeds, and verdicts on the paper's claims."""

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp


def interval(values, confidence=0.95):
    """(mean, low, high): Student's interval of the mean over seeds; (mean, -inf, inf) with a single seed."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), -np.inf, np.inf
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), float(values[0])
    low, high = ttest_1samp(values, 0).confidence_interval(confidence)
    return float(values.mean()), float(low), float(high)


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


def token_savings(rows, better, worse, budget, tokens):
    """How many times the tokens `worse` needs for what `better` reaches after `tokens`, seed by seed.

    Read off the line between the measured points of `worse` over ln(tokens); where even its last point is not as good,
    the factor up to there, which is then a lower bound.
    """
    savings = {}
    at_budget = rows[np.isclose(rows["budget"], budget) & (rows["tokens"] > 0)]
    for seed, run in at_budget.groupby("seed"):
        reached = run[(run["method"] == better) & (run["tokens"] == tokens)]["perplexity"]
        line = run[run["method"] == worse].sort_values("perplexity")
        if len(reached) and len(line):
            needed = np.interp(np.log(reached.iloc[0]), np.log(line["perplexity"]), np.log(line["tokens"]))
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
        table.append([claim, figure, needed, mean, low, high, len(measured), verdict(low, high, needed)])
    columns = ["the paper says", "measured as", "needed", "mean", "low", "high", "seeds", "here"]
    return pd.DataFrame(table, columns=columns).set_index("the paper says")
