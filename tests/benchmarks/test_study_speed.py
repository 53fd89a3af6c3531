"""The speed study divides what belongs together."""

import pandas as pd
import pytest
from study_speed import METHODS, cases, moved_bytes, prefill_table, speedup_chart, speedups, throughput_table

CASE = {
    "shape": "s",
    "layers": 1,
    "dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "budget": 0.5,
    "batch": 2,
    "context": 8,
}
COSTS = {"low": 1.0, "seconds": 2.0, "high": 4.0, "weight_bytes": 0, "cache_bytes": 100, "rebuilt_bytes": 0}


@pytest.fixture
def rows():
    half = {"seconds": 1.0, "low": 0.5, "high": 2.0, "cache_bytes": 50}
    made = []
    for part in ("attention", "generate", "throughput"):
        case = CASE | {"part": part} | COSTS | {"weight_bytes": 0 if part == "attention" else 100, "new_tokens": 4}
        made += [case | {"method": "source"}, case | half | {"method": "DHA", "batch": 4 if part == "throughput" else 2}]
    return pd.DataFrame(made).assign(peak_gib=1.0, memory_gib=2.0)


def test_the_speedup_is_the_source_over_the_method(rows):
    speeds = speedups(rows).xs("DHA", level="method")
    assert speeds["measured_speedup"].tolist() == [2, 2]
    assert (speeds["low_speedup"] < 2).all() and (speeds["high_speedup"] > 2).all()
    assert speeds["predicted_speedup"].tolist() == [2, 400 / 250]


def test_two_machines_are_kept_apart(rows):
    both = pd.concat([rows, rows.assign(device="cuda", threads=1, seconds=rows["seconds"] ** 2)])
    speeds = speedups(both)["measured_speedup"].groupby("device").first()
    assert speeds.to_dict() == {"cpu": 2, "cuda": 4}
    assert throughput_table(both).xs("DHA", level="method")["times the source's"].tolist() == [4, 8]
    lengths = both[both["part"] == "attention"].assign(length=64)
    assert prefill_table(lengths)["DHA"].tolist() == [0.5, 0.25]


def test_rebuilt_keys_are_written_and_read(rows):
    assert (moved_bytes(rows.assign(rebuilt_bytes=10)) - moved_bytes(rows)).eq(20).all()


def test_throughput_counts_the_batch(rows):
    table = throughput_table(rows).xs("DHA", level="method")
    assert table["tokens a second"].tolist() == [16] and table["times the source's"].tolist() == [4]


def test_a_method_that_a_part_has_not_leaves_its_place_empty(rows):
    figure = speedup_chart(cases(speedups(rows), "attention"), "title")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["s, batch 2, context 8"]
    assert len(figure.axes[0].collections) >= len(METHODS)


def test_a_row_has_the_same_name_in_every_panel(rows):
    """A shape that was measured at one budget only does not shift the others."""
    attention = rows[rows["part"] == "attention"]
    other = attention.assign(shape="a", budget=0.25)
    figure = speedup_chart(cases(speedups(pd.concat([attention, other])), "attention"), "title")
    labels = [text.get_text().split(",")[0] for text in figure.axes[0].get_yticklabels()]
    places = [{round(float(y)) for line in axis.containers for y in line[0].get_ydata()} for axis in figure.axes]
    assert labels == ["a", "s"] and places == [{1}, {0}]
