"""What was recorded, as the notebooks quote it."""

import math

import pandas as pd
import pytest

from dha_utils.compare import recorded
from dha_utils.compare.recorded import attention_speedups, recorded_rivals, speed_near


def test_rivals_are_compared_on_the_same_text(monkeypatch, tmp_path):
    """The low-rank cache has read more as well: that is left out; the better of its allocations counts."""
    rows = [
        (method, allocation, 0.5, seed, "austen", tokens, ratio + seed / 10)
        for method, allocation, tokens, ratio in (
            ("low rank", "cost", 100, 1.5),
            ("low rank", "uniform", 100, 1.4),
            ("low rank", "uniform", 900, 1.1),
            ("low rank, layers refitted", "uniform", 100, 1.2),
            ("spectral, layers refitted", "refit", 100, 1.3),
        )
        for seed in (0, 1)
    ]
    columns = ["method", "allocation", "budget", "seed", "text", "calibration_tokens", "ratio"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "training_free_a-model.csv")
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    table, tokens = recorded_rivals("a-model", "austen")
    assert tokens == 100
    assert table.loc[0.5].to_dict() == pytest.approx({"low rank": 1.45, "low rank, refitted": 1.25, "DHA, refitted": 1.35})
    for other in (("another", "austen"), ("a-model", "wikipedia")):
        assert recorded_rivals(*other)[0].empty
    every = pd.DataFrame(rows, columns=columns)
    more = every[every["calibration_tokens"] == 100].assign(calibration_tokens=900)
    third = every[every["calibration_tokens"] == 100].assign(budget=0.3333)
    pd.concat([every, more, third]).to_csv(tmp_path / "training_free_a-model.csv")
    assert recorded_rivals("a-model", "austen")[1] == 100, "more budgets are better than more text"
    pd.concat([every, more]).to_csv(tmp_path / "training_free_a-model.csv")
    assert recorded_rivals("a-model", "austen")[1] == 900
    every[every["method"] == "low rank"].to_csv(tmp_path / "training_free_a-model.csv")
    assert recorded_rivals("a-model", "austen")[0].empty, "nothing to compare"


def test_the_speed_is_that_of_the_nearest_measured_size():
    index = pd.MultiIndex.from_product(
        [["A"], [1, 8], [512, 4096], [0.25, 0.5]], names=["shape", "batch", "context", "budget"]
    )
    dha = [1.0, 1.0, 2.0, 1.3, 2.0, 1.0, 4.0, 2.0]
    speedups = pd.DataFrame({"source, our code": 1.6, "DHA": dha}, index)
    assert speed_near(speedups, "A", 6, 100_000, 0.25) == (4.0, 8, 4096)
    assert speed_near(speedups, "A", 1, 700, 0.25) == (1.0, 1, 512)
    assert speed_near(speedups, "A", 8, 4096, 0.75)[0] == pytest.approx(1.8), "between the measured one and all heads"
    assert speed_near(speedups, "A", 8, 4096, 1.0)[0] == pytest.approx(1.6), "of the source in the same code"
    assert math.isnan(speed_near(speedups, "A", 8, 4096, 0.1)[0]), "fewer heads than were measured"


def test_the_committed_figures_can_be_read():
    table, tokens = recorded_rivals("austen-mha", "austen")
    assert tokens > 0 and len(table) >= 3 and (table >= 0.99).all(axis=None)
    speedups = attention_speedups()
    assert {"source (ms)", "source, our code", "DHA", "low rank"} <= set(speedups)
    assert speedups.index.is_unique and (speedups["low rank"] < 1).all()
    assert speedups.groupby(["shape", "batch", "context"])["source (ms)"].nunique().eq(1).all(), "one source a case"
