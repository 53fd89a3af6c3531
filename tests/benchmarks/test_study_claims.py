"""Verdicts computed from rows whose answer is known."""

import numpy as np
import pandas as pd
import paper_claims
import pytest
from study_claims import (
    METHODS,
    at_best_rate,
    complete_runs,
    gains,
    heads_by_layer,
    paper_verdicts,
    token_savings,
    trained_by_all,
)

from dha_utils.runs import append_rows

# perplexity after 100, 300 and 3,000 tokens
CURVES = {
    "GQA": (200, 150, 110),
    "GQA, groups by CKA": (201, 151, 110.5),
    "DHA layout, mean-pooled neighbours": (180, 140, 108),
    "DHA without adaptive allocation": (160, 115, 106),
    "DHA without learned fusion": (150, 120, 107),
    "DHA": (140, 108, 101),
    "source": (95, 97, 100),
}


@pytest.fixture
def rows():
    table = []
    for method, curve in CURVES.items():
        for tokens, perplexity in zip((100, 300, 3000), curve):
            for seed in range(3):
                noise = 1 + 0.001 * np.random.default_rng([seed, tokens, len(method)]).standard_normal()
                share = 1.0 if method == "source" else 0.25
                row = {"method": method, "budget": share, "tokens": tokens, "seed": seed, "perplexity": perplexity * noise}
                table.append(row | {"heads_by_layer": "3+1 4+2 2+1 2+1" if method != "source" else ""})
    return pd.DataFrame(table)


def test_every_claim_gets_its_verdict(rows):
    table = paper_verdicts(rows, 0.25, 3000)
    assert (table["here"] == "holds").all(), table
    assert table.loc["97.6 % of the source's quality", "mean"] == pytest.approx(99, abs=0.3)
    assert table.loc["adaptive allocation matters", "mean"] == pytest.approx(np.log(106 / 101), abs=0.003)
    assert (table["seeds"] == 3).all()

    rows.loc[rows["method"] == "DHA", "perplexity"] *= 1.25
    rows["heads_by_layer"] = rows["heads_by_layer"].replace("3+1 4+2 2+1 2+1", "1+2 1+2 2+3 2+3")
    worse = paper_verdicts(rows, 0.25, 3000)["here"]
    assert (worse == "does not hold").sum() == 6, worse
    assert worse["the layout alone beats GQA"] == worse["groups by CKA gain GQA nothing"] == "holds"


def test_a_wide_interval_decides_nothing(rows):
    noisy = rows["method"].eq("DHA") & rows["seed"].eq(0)
    rows.loc[noisy, "perplexity"] *= 1.3
    table = paper_verdicts(rows, 0.25, 3000)
    assert table.loc["learned fusion matters", "here"] == "cannot be told"
    one = paper_verdicts(rows[rows["seed"] == 1], 0.25, 3000)
    assert (one["here"] == "cannot be told").all()


def test_a_saving_cut_off_by_the_longest_run_decides_nothing(rows):
    early = rows[rows["tokens"] < 3000]
    claim = paper_verdicts(early, 0.25, 300).loc["GQA's loss with 5 times fewer tokens"]
    assert claim["mean"] == pytest.approx(3) and claim["here"] == "cannot be told"


def test_savings_are_read_off_the_line(rows):
    rows["perplexity"] = [
        CURVES[method][(100, 300, 3000).index(tokens)] for method, tokens in zip(rows["method"], rows["tokens"])
    ]
    assert token_savings(rows, "DHA", "GQA", 0.25, 300).tolist() == pytest.approx([10.0] * 3)  # a lower bound: 108 < 110
    between = np.interp(np.log(140), np.log([110, 150]), [3000, 300])
    assert token_savings(rows, "DHA", "GQA", 0.25, 100)[0] == pytest.approx(between / 100)
    late = rows["method"].eq("GQA") & rows["tokens"].eq(3000)
    rows.loc[late, "perplexity"] = 170  # it overfits: what it had after 300 tokens still counts
    assert token_savings(rows, "DHA layout, mean-pooled neighbours", "GQA", 0.25, 100)[0] == pytest.approx(
        np.interp(np.log(180), np.log([150, 200]), [300, 100]) / 100
    )
    untrained = pd.DataFrame({"method": "GQA", "budget": 0.25, "tokens": 0, "seed": range(3), "perplexity": 800.0})
    rows.loc[rows["method"].eq("DHA") & rows["tokens"].eq(100), "perplexity"] = 400  # worse than GQA: it saves nothing
    less = token_savings(pd.concat([rows, untrained]), "DHA", "GQA", 0.25, 100)
    assert less.tolist() == pytest.approx([0.5] * 3)
    assert gains(rows, "DHA", "GQA", 0.25, 100)[2] == pytest.approx(np.log(200 / 400))
    assert heads_by_layer(rows, "DHA", 0.25).shape == (9, 4, 2)


def test_every_method_gets_its_best_rate(rows):
    fast = rows.assign(learning_rate=5e-4)
    slow = rows.assign(learning_rate=2e-4, perplexity=rows["perplexity"] * np.where(rows["method"] == "DHA", 0.9, 1.1))
    slow.loc[slow["seed"] == 0, "perplexity"] *= 1.01
    best = at_best_rate(pd.concat([fast, slow]))
    assert len(best) == len(rows)
    assert (best["learning_rate"] == np.where(best["method"] == "DHA", 2e-4, 5e-4)).all()


def test_longer_runs_are_not_slower_than_the_best_of_the_shorter(tmp_path):
    run = {"method": "GQA", "budget": 1 / 3, "tokens": 300, "text": "austen"}
    rates, out = [1e-4, 2e-4, 5e-4], tmp_path / "rows.csv"
    assert paper_claims.rates_to_try(out, run, rates, 500) == rates
    for seed, perplexities in enumerate(([9, 6, 7], [9, 6, 5.5])):
        for rate, perplexity in zip(rates, perplexities):
            append_rows(out, [run | {"tokens": 100, "seed": seed, "learning_rate": rate, "perplexity": perplexity}])
    append_rows(out, [run | {"tokens": 300, "seed": 0, "learning_rate": 5e-4, "perplexity": 1}])
    assert paper_claims.rates_to_try(out, run, rates, 500) == [2e-4, 5e-4]
    assert paper_claims.rates_to_try(out, run | {"method": "DHA"}, rates, 500) == rates
    assert paper_claims.rates_to_try(out, run, rates, 100) == rates  # three passes over the text


def test_runs_that_lack_a_seed_are_left_out(rows):
    rows["learning_rate"] = 2e-4
    unfinished = rows[(rows["method"] == "DHA") & (rows["tokens"] == 3000)].index[0]
    left = complete_runs(rows.sample(frac=1, random_state=0).drop(unfinished))
    assert len(left) == len(rows) - 3
    assert left.query("tokens == 3000")["method"].drop_duplicates().tolist() == [m for m in CURVES if m != "DHA"]
    assert left.query("tokens == 300")["method"].drop_duplicates().tolist() == list(CURVES)
    assert list(paper_claims.METHODS) == list(METHODS)


def test_a_claim_whose_methods_have_not_run_gets_no_verdict(rows):
    table = paper_verdicts(rows[rows["method"] != "GQA, groups by CKA"], 0.25, 3000)
    assert len(table) == 7 and "groups by CKA gain GQA nothing" not in table.index


def test_methods_are_compared_where_none_is_missing(rows):
    assert trained_by_all(rows) == 3000
    assert trained_by_all(rows.drop(index=rows.index[(rows["tokens"] == 3000) & (rows["method"] == "DHA")][0])) == 300
