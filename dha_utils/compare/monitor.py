"""Watching a model that is in use: a baseline of what it did when it was accepted, and whether it still does.

All metrics are means over blocks of text, and higher is worse. A limit is how high such a mean comes by the choice of text
alone, by the spread over the blocks of the baseline: an unchanged model goes beyond any of them in a chosen share of checks
(`false_alarms`), as far as blocks are alike in kind and independent. Blocks of few documents are less so.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from ..runs import write_whole
from ..sources.precision import dtype_name
from ..sources.text import BUNDLED, SPLITS, drawn, load_text, token_blocks
from .drift import token_predictions

FEWEST = 8  # blocks that still say something about the spread
METRICS = {
    "loss": "LM loss (nats a token)",
    "wrong": "share of tokens whose most likely one is not the true one",
    "overconfidence": "mean probability of the most likely token, less the share that is right",
}


def fresh_blocks(tokenizer, text, length, count, seed=0):
    """`count` blocks [count, length] drawn by `seed` from `text`: a file or folder whole, of a bundled text its validation.

    Raises ValueError if there is too little of it.
    """
    splits = ("validation",) if text in BUNDLED else SPLITS
    blocks = token_blocks(tokenizer, [document for split in splits for document in load_text(text, split)], length)
    if len(blocks) < count:
        raise ValueError(f"the text has {len(blocks)} blocks of {length} tokens, the baseline {count}: give more text")
    return drawn(blocks, count, seed)


def block_metrics(model, blocks):
    """The `METRICS` of each block: one row a block."""
    tokens = token_predictions(model, blocks)
    means = tokens.astype(float).groupby("block").mean()
    worse = {"loss": means["loss"], "wrong": 1 - means["right"], "overconfidence": means["confidence"] - means["right"]}
    return pd.DataFrame(worse)


def limits(rows, false_alarms):
    """The highest mean of each metric over as many blocks that is still put down to the choice of text.

    Student's bound for the mean of a second sample: `rows` (`block_metrics`) are n blocks, so are those to come.
    `false_alarms`: the share of checks of an unchanged model that go beyond any of the metrics, at most.
    """
    count = len(rows)
    reach = t(count - 1).isf(false_alarms / rows.shape[1]) * np.sqrt(2 / count)
    return (rows.mean() + reach * rows.std()).to_dict()


def write_baseline(path, model, blocks, text, false_alarms=0.001, **described):
    """Measure `model` on `blocks` [n, length] and write the baseline (JSON): what was read, means and limits.

    Raises ValueError if there are fewer than `FEWEST` blocks.
    """
    if len(blocks) < FEWEST:
        raise ValueError(f"a baseline needs at least {FEWEST} blocks of text, not {len(blocks)}")
    rows = block_metrics(model, blocks)
    highest = limits(rows, false_alarms)
    metrics = {name: {"mean": rows[name].mean(), "limit": highest[name], "what": METRICS[name]} for name in rows}
    read = {"text": str(text), "blocks": len(blocks), "length": blocks.shape[1], "dtype": dtype_name(model.dtype)}
    baseline = described | read | {"false_alarms": false_alarms, "metrics": metrics}
    write_whole(path, json.dumps(baseline, indent=1) + "\n")
    return baseline


def read_baseline(path):
    """Raises ValueError if the file is not there, or no baseline."""
    try:
        baseline = json.loads(Path(path).read_text())
        missing = {"blocks", "length", "dtype"} - baseline.keys()
        for metric in baseline["metrics"].values():
            missing |= {"mean", "limit", "what"} - metric.keys()
        if missing:
            raise KeyError(*sorted(missing))
        return baseline
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a baseline.json of notebook 06 ({type(error).__name__}: {error})") from error


def check_drift(baseline, model, blocks):
    """One row a metric: `baseline`, `limit`, `now`, and `drift`, whether it is beyond the limit."""
    now = block_metrics(model, blocks).mean()
    rows = {name: {"baseline": m["mean"], "limit": m["limit"], "now": now[name]} for name, m in baseline["metrics"].items()}
    table = pd.DataFrame(rows).T
    return table.assign(drift=~(table["now"] <= table["limit"]))  # not a number is drift
