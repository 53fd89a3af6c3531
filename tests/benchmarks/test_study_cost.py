"""The predicted and the measured cost of a conversion."""

import pandas as pd
import pytest
from study_cost import SHAPES, conversion_flops, cost_table, growth, layer_flops, layer_gib, scale_table


def test_growth_is_the_exponent():
    costs = [
        {"case": f"{dimension} {n}", "layers": 8, "heads": 8, "hidden": 512, dimension: n}
        for dimension, sizes in (("layers", (4, 16)), ("heads", (4, 16)), ("hidden", (256, 1024)))
        for n in sizes
    ] + [{"case": "base", "layers": 8, "heads": 8, "hidden": 512}]
    costs = pd.DataFrame(costs).assign(stage="convert")
    costs["seconds"] = costs["layers"] * costs["heads"] ** 0.5 * costs["hidden"] ** 2.0
    costs["peak_gib"] = costs["layers"] * costs["hidden"]
    table = growth(costs)
    assert table["seconds"].tolist() == pytest.approx([1, 0.5, 2])
    assert table["peak_gib"].tolist() == pytest.approx([1, 0, 1], abs=1e-9)


def test_a_forward_pass_is_two_operations_per_weight_and_token():
    shape = SHAPES["LLaMA-2-7B"]
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    assert sum(layer_flops(shape, 1000, 0)) == 2 * 1000 * weights
    longer = conversion_flops(shape, 32768, 512)["converting"] / conversion_flops(shape, 16384, 512)["converting"]
    assert 1.8 < longer < 2.0  # energies do not grow with the text


def test_bigger_models_take_longer_and_more_memory():
    table = scale_table(16384, 512, 60, 0.4, 12)
    assert (
        table["minutes"].is_monotonic_increasing is False and table.loc["Llama-3-70B", "minutes"] == table["minutes"].max()
    )
    assert table.loc["LLaMA-2-7B", "fits"] == "yes" and table.loc["Llama-3-70B", "fits"] == "no"
    assert layer_gib(SHAPES["LLaMA-2-7B"], 16384) < 12


def test_rates_are_operations_over_seconds():
    shape = {"case": "a", "tokens": 2048, "length": 256} | SHAPES["LLaMA-2-7B"]
    stages = {"pricing": 10.0, "converting": 20.0, "convert": 30.0}
    rows = pd.DataFrame([shape | {"stage": s, "seconds": t, "peak_gib": 1.0} for s, t in stages.items()])
    table = cost_table(rows)
    flops = conversion_flops(shape, 2048, 256)
    assert table.loc["a", "pricing: GFLOP/s"] == pytest.approx(flops["pricing"] / 10 / 1e9)
    assert table.loc["a", "whole: s"] == 30
