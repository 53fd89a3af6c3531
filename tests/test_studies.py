"""Verdicts computed from rows whose answer is known."""

from itertools import product

import numpy as np
import pandas as pd
import paper_claims
import pytest

from dha_utils.beyond import (
    MEASURES,
    STEPS,
    against_low_rank,
    beside_gqa,
    growth,
    ladder,
    rank_agreement,
    recovery_table,
    step_gains,
    ways,
)
from dha_utils.claims import (
    METHODS,
    at_best_rate,
    complete_runs,
    gains,
    heads_by_layer,
    paper_verdicts,
    token_savings,
    trained_by_all,
    verdict,
)
from dha_utils.evaluation import interval
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
    run = {"method": "GQA", "budget": 1 / 3, "tokens": 300}
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


def test_interval_is_students():
    mean, low, high = interval([1, 2, 3])
    assert (
        mean == 2 and high - mean == pytest.approx(4.3027 / 3**0.5, rel=1e-4) and mean - low == pytest.approx(high - mean)
    )
    assert interval([2, 2, 2]) == (2, 2, 2)
    assert verdict(1, 2) == "holds" and verdict(-2, -1) == "does not hold" and verdict(-1, 1) == "cannot be told"


def test_rank_agreement_is_minus_spearmans():
    random = np.random.default_rng(0)
    pairs = pd.DataFrame({measure: random.random(60) for measure in MEASURES} | {"kind": ["key", "value"] * 30})
    pairs["divergence"] = np.exp(-pairs["spectral"])
    table = rank_agreement(pairs, resamples=200)
    assert list(table.index) == list(MEASURES)
    assert table.loc["spectral", [("key", "ρ"), ("value", "low")]].tolist() == pytest.approx([1, 1])
    others = table.drop(index="spectral")["key"]
    assert ((others["low"] <= others["ρ"]) & (others["ρ"] <= others["high"])).all() and (others["low"] < 0.2).all()


@pytest.fixture
def fused():
    """Rows as `benchmarks/training_free.py` writes them: every step a tenth better than the last, low rank at 100."""
    table = []
    for (budget, level), seed in product(((0.5, 1), (0.25, 3)), range(3)):
        cases = {case: 200 * level * 0.9**step for step, case in enumerate(STEPS)}
        cases |= {("low rank", "uniform"): 110, ("low rank", "cost"): 100}
        for (method, allocation), perplexity in cases.items():
            row = {"method": method, "allocation": allocation, "budget": budget, "seed": seed, "base_perplexity": 20}
            row["calibration_tokens"] = 4096
            noise = 0.001 * seed if method == "low rank" else 0
            table.append(row | {"perplexity": perplexity * (1 + noise)})
    return pd.DataFrame(table).sample(frac=1, random_state=0)


def test_the_last_step_is_held_against_the_better_low_rank_cache(fused):
    table = against_low_rank(fused)
    assert list(table.index) == [(0.5, 4096), (0.25, 4096)]
    assert table["DHA / low rank"].tolist() == pytest.approx([2 * 0.9**7, 6 * 0.9**7], rel=2e-3)
    assert table["DHA is lower"].tolist() == ["holds", "does not hold"]
    fused.loc[fused["method"].str.contains("layers refitted"), "perplexity"] /= 4
    assert against_low_rank(fused)["DHA is lower"].tolist() == ["holds", "holds"]
    more = fused[fused["seed"] == 0].assign(calibration_tokens=8192)  # a single draw of more text decides nothing
    both = against_low_rank(pd.concat([fused, more]))
    assert list(both.index) == list(product((0.5, 0.25), (4096, 8192)))
    assert both["draws"].tolist() == [3, 1, 3, 1]
    assert both["DHA is lower"].tolist() == ["holds", "cannot be told"] * 2


def test_the_ladder_shows_every_step_in_its_order(fused):
    figure = ladder(fused, "a title")
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(STEPS.values())
    shown = {text.get_text() for text in axis.get_legend().get_texts()}
    assert shown == {"50%", "25%", "low rank, 50%", "low rank, 25%", "source"}


def test_gains_are_paired_by_draw(fused):
    fused = fused[~fused["method"].str.contains("attention") | (fused["seed"] == 0)]
    table = step_gains(fused)
    assert list(table.columns) == [0.5, 0.25] and list(table.index) == list(STEPS.values())[1:]
    assert table.to_numpy() == pytest.approx(0.9)


def test_growth_is_the_exponent():
    costs = [
        {"case": f"{dimension} {n}", "layers": 8, "heads": 8, "hidden": 512, dimension: n}
        for dimension, sizes in (("layers", (4, 16)), ("heads", (4, 16)), ("hidden", (256, 1024)))
        for n in sizes
    ] + [{"case": "base", "layers": 8, "heads": 8, "hidden": 512}]
    costs = pd.concat([pd.DataFrame(costs).assign(stage=stage) for stage in ("fusion", "refit")])
    costs["seconds"] = costs["layers"] * costs["heads"] ** 0.5 * costs["hidden"] ** 2.0
    costs["peak_mib"] = costs["layers"] * costs["hidden"]
    table = growth(costs)
    assert table["seconds"].tolist() == pytest.approx([1, 0.5, 2])
    assert table["peak_mib"].tolist() == pytest.approx([1, 0, 1], abs=1e-9)


def test_ways_to_recover_are_compared_after_equal_tokens_and_seconds():
    runs = [
        ("spectral", "attention", 100, 81, 40, 5e-4),
        ("spectral", "all", 200, 81, 50, 5e-4),
        ("spectral", "all", 200, 81, 36, 2e-4),
        ("source", "attention", 50, 19.5, 24.5, 5e-4),
        ("source", "all", 50, 19.5, 23.5, 5e-4),
    ]
    rows = pd.DataFrame(
        {"start": start, "loss": "distil", "trainable": trainable, "budget": 0.5, "seed": seed, "seconds": seconds}
        | {"tokens": tokens, "total_tokens": 100, "perplexity": perplexity + seed, "learning_rate": rate}
        for start, trainable, seconds, begin, end, rate in runs
        for seed in range(2)
        for tokens, perplexity in ((0, begin), (100, end))
    )
    table = recovery_table(ways(rows))
    assert len(table) == 2
    light, full = table.loc[("50.0%", "spectral, distilled, attention")], table.loc[("50.0%", "spectral, distilled, all")]
    assert light["after all tokens"] == light["after 100 s"] == 40.5
    assert (light["over the source"], light["over it trained alike"]) == (40.5 / 20, 40.5 / 25)
    assert (full["lowest"], full["highest"], full["seeds"]) == (36, 37, 2)
    assert full["over it trained alike"] == 36.5 / 24
    assert full["after 100 s"] == pytest.approx(((81 * 36) ** 0.5 + (82 * 37) ** 0.5) / 2)  # half of its time


def test_gqa_stands_beside_a_twentieth_of_its_tokens():
    gqa = {100: (60, 70), 1000: (40, 50), 5000: (24, 34)}
    claims = [
        {"method": method, "tokens": tokens, "perplexity": perplexity - 10 * (method == "source")}
        for method in ("GQA", "source")
        for tokens, both in ({0: (900, 900)} | gqa).items()
        for perplexity in both
    ]
    here = [
        (tokens, perplexity) for tokens, both in {0: (44, 46), 50: (28, 32), 200: (30, 36)}.items() for perplexity in both
    ]
    table = beside_gqa(pd.DataFrame(claims), pd.DataFrame(here, columns=["tokens", "perplexity"]))
    assert table.index.tolist() == list(gqa)
    assert table["tokens here"].tolist() == [0, 50, 200] and table["here"].tolist() == [45, 30, 33]
    assert table["GQA"].tolist() == [65, 45, 29] and table["source"].tolist() == [55, 35, 19]
    assert table["here is lower"].tolist() == ["holds", "holds", "cannot be told"]
