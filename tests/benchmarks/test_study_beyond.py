"""Tables beyond the paper, computed from rows whose answer is known."""

from itertools import product

import pandas as pd
import pytest
from study_beyond import STEPS, against_low_rank, beside_gqa, every_way, ladder, recovery_table, step_gains, ways


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


def test_equals_are_held_against_the_better_low_rank_cache(fused):
    table = against_low_rank(fused)
    steps = ["neither refitted", "shared heads refitted"]
    assert list(table.index) == [(budget, 4096, step) for budget in (0.5, 0.25) for step in steps]
    ratios = [level * 2 * 0.9**step for level in (1, 3) for step in (5, 7)]
    assert table["DHA / low rank"].tolist() == pytest.approx(ratios, rel=2e-3)
    assert table["DHA is lower"].tolist() == ["does not hold", "holds", "does not hold", "does not hold"]
    rival = fused[fused["method"] == "low rank"].assign(method="low rank, layers refitted")
    both = against_low_rank(pd.concat([fused, rival.assign(perplexity=rival["perplexity"] / 4)]))
    both = both.xs("both refitted", level="step")
    assert both["low rank"].tolist() == pytest.approx([25, 25], rel=2e-3)
    assert both["DHA is lower"].tolist() == ["does not hold"] * 2


def test_a_single_draw_decides_nothing(fused):
    more = fused[fused["seed"] == 0].assign(calibration_tokens=8192)
    both = against_low_rank(pd.concat([fused, more])).xs("shared heads refitted", level="step")
    assert list(both.index) == list(product((0.5, 0.25), (4096, 8192)))
    assert both["draws"].tolist() == [3, 1, 3, 1]
    assert both["DHA is lower"].tolist() == ["holds", "cannot be told", "does not hold", "cannot be told"]


def test_the_ladder_shows_every_step_in_its_order(fused):
    figure = ladder(fused, "a title")
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [*STEPS.values(), "low-rank cache of the same size"]
    shown = {text.get_text() for text in axis.get_legend().get_texts()}
    assert shown == {"50%", "25%", "source"}


def test_gains_are_paired_by_draw(fused):
    fused = fused[~fused["method"].str.contains("attention") | (fused["seed"] == 0)]
    table = step_gains(fused)
    assert list(table.columns) == [0.5, 0.25] and list(table.index) == list(STEPS.values())[1:]
    assert table.to_numpy() == pytest.approx(0.9)


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


def test_every_way_shows_mean_and_range():
    case = {"calibration_tokens": 1, "method": "a", "allocation": "b", "budget": 0.5}
    table = every_way(pd.DataFrame([case | {"perplexity": value} for value in (10.0, 12.0)]))
    assert table.loc[(1, "a", "b"), 0.5] == "11.0 (10.0 to 12.0)"
    assert every_way(pd.DataFrame([case | {"perplexity": 1234.5}])).loc[(1, "a", "b"), 0.5] == "1,234.5"
