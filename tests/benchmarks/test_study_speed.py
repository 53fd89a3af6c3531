"""The speed study divides what belongs together."""

import pandas as pd
import pytest
from study_speed import (
    SERIES,
    beside,
    by_budget,
    low_rank_table,
    moved_bytes,
    prefill_table,
    speed_table,
    speedup_chart,
    speedups,
    spread,
    throughput_table,
    without_what_is_the_same,
)

CASE = {
    "shape": "s",
    "layers": 1,
    "dtype": "float32",
    "device": "cpu",
    "processor": "AVX2",
    "threads": 2,
    "budgets": "50% + 25%",
    "batch": 2,
    "context": 8,
}
COSTS = {"weight_bytes": 0, "rebuilt_bytes": 0}
SECONDS = {"source": 2.0, "source, our code": 1.6, "DHA": 1.0, "GQA": 1.25}


@pytest.fixture
def rows():
    made = []
    for part in ("attention", "generate", "low_rank"):
        case = CASE | {"part": part} | COSTS
        case |= {"weight_bytes": 100, "new_tokens": 4} if part == "generate" else {}
        for method, seconds in ({"source": 2.0, "low rank": 20.0} if part == "low_rank" else SECONDS).items():
            for budget in (1.0,) if method.startswith("source") else (0.5, 0.25):
                row = case | {"method": method, "budget": budget, "seconds": seconds * budget**0.5}
                row |= {"cache_bytes": 100 * budget, "speedup": 2 / row["seconds"]}
                made.append(row | {"speedup_low": row["speedup"] / 2, "speedup_high": row["speedup"] * 2})
    return pd.DataFrame(made)


@pytest.fixture
def served():
    """The source with two sequences takes turns with DHA, four sequences at half and eight at a quarter of the cache."""
    case = CASE | {
        "part": "throughput",
        "rival": "DHA",
        "memory_gib": 2.0,
        "peak_gib": 1.0,
        "new_tokens": 4,
        "cache_bytes": 9,
    }
    made = []
    for budget in (0.25, 0.5):
        turns = case | {"budgets": f"{budget:.0%}"}
        made.append(turns | {"method": "source", "budget": 1.0, "seconds": 2.0, "speedup": 1.0})
        made.append(turns | {"method": "DHA", "budget": budget, "seconds": 4.0, "speedup": 0.8, "batch": 2 / budget})
    return pd.DataFrame(made)


def test_bytes_predict_beside_the_source_of_the_same_case(rows):
    more = pd.concat([rows, rows.assign(batch=16, cache_bytes=rows["cache_bytes"] * 8)])
    speeds = speedups(more).xs("DHA", level="method")
    assert speeds["predicted"].xs("attention", level="part").tolist() == [2, 4, 2, 4]
    assert speeds["predicted"].xs(("generate", 2), level=["part", "batch"]).tolist() == [400 / 250, 400 / 175]
    twice = pd.concat([rows, rows[rows["method"] == "source"]])
    with pytest.raises(pd.errors.MergeError):
        speedups(twice)


def test_two_machines_are_kept_apart(rows, served):
    both, gpu = ([own, own.assign(device="cuda", processor="a GPU", seconds=own["seconds"] ** 2)] for own in (rows, served))
    both, gpu = pd.concat(both), pd.concat(gpu)
    assert len(speedups(both)) == 2 * len(speedups(rows))
    assert throughput_table(gpu).xs(("DHA", 0.5), level=["method", "budget"])["tokens a second"].tolist() == [4, 1]
    lengths = both[both["part"] == "attention"].assign(length=64)
    table = prefill_table(lengths)
    assert table["source (s)"].tolist() == [2, 4] and table["DHA, 50%"].tolist() == pytest.approx([0.5**1.5, 0.125])


def test_rebuilt_keys_are_written_and_read(rows):
    assert (moved_bytes(rows.assign(rebuilt_bytes=10)) - moved_bytes(rows)).eq(20).all()


def test_throughput_counts_the_batch(served):
    table = without_what_is_the_same(throughput_table(served))
    assert table.index.tolist() == [(1.0, "source"), (0.5, "DHA"), (0.25, "DHA")]
    assert table["tokens a second"].tolist() == [4, 4, 8] and table["sequences that fit"].tolist() == [2, 4, 8]
    assert table["times the source's"].tolist() == pytest.approx([1, 1.6, 3.2]), "turn by turn, not by the medians"
    assert table["times as long a token"].tolist() == [1, 1.25, 1.25]


def test_a_method_is_compared_at_its_own_budget_and_beside_all_heads(rows):
    speeds = speedups(rows)
    control = beside(speeds, "DHA", "source, our code").xs("attention", level="part")
    assert control.groupby("budget").first().to_dict() == pytest.approx({0.25: 3.2, 0.5: 1.6 / 0.5**0.5})
    assert beside(speeds, "DHA", "GQA").tolist() == pytest.approx([1.25] * 4)
    assert by_budget(control) == "2.26 (50% of the heads), 3.20 (25%)"
    assert spread(control) == "2.26 to 3.20"


def test_the_tables_have_a_row_a_load(rows):
    other = rows[rows["budget"] != 0.25].assign(shape="a", budgets="50%", dtype="bfloat16", context=1024)
    speeds = speedups(pd.concat([rows, other]))
    table = speed_table(speeds, "attention")
    assert list(table) == ["source (ms)", "source, our code", "DHA, 50%", "GQA, 50%", "DHA, 25%", "GQA, 25%"]
    assert table.index.tolist() == [("s, 1 layer, float32, AVX2", 2, 8), ("a, 1 layer, bfloat16, AVX2", 2, 1024)]
    assert table["DHA, 25%"].tolist() == [4.0, "–"] and table["source (ms)"].tolist() == [2000, 2000]
    assert speed_table(speeds, "generate")["source (ms)"].tolist() == [500, 500], "a token of four"
    assert low_rank_table(speeds)["50% of the cache"].tolist() == pytest.approx([10 * 0.5**0.5] * 2)


def test_a_panel_a_model_and_a_line_a_load(rows):
    other = rows[rows["method"] != "GQA"].assign(shape="a", layers=2)
    figure = speedup_chart(speedups(pd.concat([rows, other])), "attention", "title")
    assert [axis.get_title() for axis in figure.axes] == ["a, 2 layers, float32, AVX2", "s, 1 layer, float32, AVX2"]
    for axis, methods in zip(figure.axes, (len(SERIES) - 1, len(SERIES))):
        assert [text.get_text() for text in axis.get_yticklabels()] == ["2 × 8, 50%", "2 × 8, 25%"]
        assert len(axis.containers) == 2 * methods
    dha = [container for container in figure.axes[1].containers if container.get_label() == "DHA"]
    assert [float(container[0].get_xdata()[0]) for container in dha] == pytest.approx([2 / 0.5**0.5, 4])
