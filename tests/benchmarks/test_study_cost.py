"""The predicted and the measured cost of a conversion."""

import pandas as pd
import pytest
from study_cost import SHAPES, conversion_flops, cost_table, growth, layer_flops, layer_gib, scale_table, search_seconds

SEARCHES = pd.DataFrame(
    [{"search": "fast", "heads": n, "kind": kind, "seconds": n / 2} for n in (16, 32, 64) for kind in ("key", "value")]
    + [{"search": "exact", "heads": 8, "kind": kind, "seconds": 0.5} for kind in ("key", "value")]
)


def test_growth_is_over_the_size_of_the_base():
    costs = [
        {"case": f"{dimension} {n}", "layers": 8, "heads": 8, "hidden": 512, dimension: n}
        for dimension, sizes in (("layers", (4, 16)), ("heads", (4, 16)), ("hidden", (256, 1024)))
        for n in sizes
    ] + [{"case": "base", "layers": 8, "heads": 8, "hidden": 512}]
    costs = pd.DataFrame(costs).assign(stage="convert", peak_gib=1.0)
    costs["seconds"] = costs["layers"] * costs["hidden"] ** 2.0
    times = growth(costs).loc["seconds"].div(8 * 512**2.0)
    assert list(times.columns) == [0.5, 1, 2]
    assert times.loc["layers"].tolist() == [0.5, 1, 2]
    assert times.loc["heads"].tolist() == [1, 1, 1]
    assert times.loc["hidden"].tolist() == [0.25, 1, 4]


def test_the_search_is_that_of_the_heads_measured():
    seconds = [search_seconds(SHAPES[name], SEARCHES) for name in ("LLaMA-2-7B", "LLaMA-2-13B", "Llama-3-8B")]
    assert seconds[0] == pytest.approx(32) and 32 < seconds[1] < 64 and seconds[2] == pytest.approx(1)
    assert search_seconds(SHAPES["LLaMA-2-7B"] | {"hidden": 2048}, SEARCHES) == 0, "narrower heads were not measured"
    assert search_seconds(SHAPES["LLaMA-2-7B"] | {"key_value_heads": 3}, SEARCHES) == 0


def test_a_forward_pass_is_two_operations_per_weight_and_token():
    shape = SHAPES["LLaMA-2-7B"]
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    assert sum(layer_flops(shape, 1000, 0)) == 2 * 1000 * weights
    longer = conversion_flops(shape, 32768, 512)["converting"] / conversion_flops(shape, 16384, 512)["converting"]
    assert 1.8 < longer < 2.0  # energies do not grow with the text


def test_bigger_models_take_longer_and_more_memory():
    table = scale_table(SEARCHES, 16384, 512, 60, 0.4, 12)
    products = table["matrix products: min"]
    assert products["Llama-3-70B"] == products.max() and products["LLaMA-2-13B"] > products["LLaMA-2-7B"]
    assert table.loc["LLaMA-2-7B", "search: min"] == pytest.approx(32 * 32 / 60)
    assert table.loc["LLaMA-2-7B", "whole: min"] == pytest.approx(products["LLaMA-2-7B"] + 32 * 32 / 60)
    assert table.loc["LLaMA-2-7B", "fits"] == "yes" and table.loc["Llama-3-70B", "fits"] == "no"
    assert layer_gib(SHAPES["LLaMA-2-7B"], 16384) < 12


def test_rates_are_operations_over_seconds():
    shape = {"case": "a", "tokens": 2048, "length": 256} | SHAPES["LLaMA-2-7B"]
    stages = {"pricing": 10.0 + 32 * 32, "converting": 20.0, "convert": 30.0}
    rows = pd.DataFrame([shape | {"stage": s, "seconds": t, "peak_gib": 1.0} for s, t in stages.items()])
    table = cost_table(rows, SEARCHES)
    flops = conversion_flops(shape, 2048, 256)
    assert table.loc["a", "pricing: GFLOP/s"] == pytest.approx(flops["pricing"] / 10 / 1e9)
    assert table.loc["a", "whole: s"] == 30
