"""The long-context study compares each model with the source on the same text."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from study_long import TASKS, bits_chart, bits_table, excess, excess_chart, excess_table, mean_excess, repeats_table


@pytest.fixture
def rows():
    stages = [("source", 1.0, 0.0), ("refitted", 0.5, 0.5), ("recovered", 0.5, 0.25)]
    return pd.DataFrame(
        {"budget": budget, "stage": stage, "task": task, "place": place, "draw": draw, "loss": draw + place + more}
        for stage, budget, more in stages
        for task in TASKS
        for place in (1, 2)
        for draw in (0, 3)
    ).assign(repeated=0.0, context=8)


def test_each_text_is_compared_with_itself(rows):
    assert excess(rows).groupby("stage")["excess"].agg(["min", "max"]).to_dict("index") == {
        "recovered": {"min": 0.25, "max": 0.25},
        "refitted": {"min": 0.5, "max": 0.5},
    }
    with pytest.raises(pd.errors.MergeError):
        excess(pd.concat([rows, rows.assign(device="cuda")]))
    table = excess_table(rows)
    assert table[("source", "loss (nats)")].tolist() == [2.5, 3.5] * len(TASKS)
    assert set(table[(0.5, "refitted")]) == {0.5}


def test_a_mean_over_positions_is_one_over_tokens(rows):
    """The mean of eight spans, the first of 15 tokens and the last of 4,096, was called a mean over tokens."""
    late = (rows["stage"] != "source") & (rows["place"] == 2)
    rows = rows.assign(loss=rows["loss"] + 7.0 * late)  # at positions 2 to 7, not at 1
    means = mean_excess(excess(rows), ["task", "stage"])
    assert means["position", "refitted"] == pytest.approx(0.5 + 7 * 6 / 7)
    assert means["copy", "refitted"] == pytest.approx(0.5 + 7 / 2)


def test_models_calibrated_both_ways_stand_side_by_side(rows):
    better = rows.query("stage == 'refitted'").assign(repeated=0.25, loss=lambda rows: rows["loss"] - 0.375)
    table = repeats_table(pd.concat([rows, better]))
    assert table.columns.tolist() == [("refitted", "a quarter repeats"), ("refitted", "running text")], "made both ways"
    assert table.index.tolist() == [
        (0.5, task, place) for task in TASKS for place in (["all"] if task == "position" else [1, 2])
    ]
    assert (table["refitted", "a quarter repeats"] == 0.125).all() and (table["refitted", "running text"] == 0.5).all()


def test_a_panel_a_task(rows):
    axes = excess_chart(rows, "what is lost").axes
    assert [axis.get_title() for axis in axes] == [tested for tested, _ in TASKS.values()]
    plt.close("all")


def test_bits_are_compared_with_the_exact_source():
    sizes = {(1.0, 16): 800, (1.0, 4): 200, (0.5, 16): 400}
    rows = pd.DataFrame({"budget": b, "bits": n, "perplexity": s / 10, "cache_bytes": s} for (b, n), s in sizes.items())
    table = bits_table(rows)["cache_bytes, times the source's"]
    assert table.to_dict() == {(1.0, 16): 1.0, (1.0, 4): 0.25, (0.5, 16): 0.5}
    assert len(bits_chart(rows, "bits").axes[0].lines) == 2
    plt.close("all")
