"""What a similarity says of heads that are copies, and how well it foretells a cost."""

import numpy as np
import pandas as pd
import pytest
from conftest import SHAPES, tiny_llama
from similarity import cosine, measured_costs, omega_similarity

from dha_utils import plant_redundancy
from dha_utils.measure.energies import head_energies
from dha_utils.measure.similarity import MEASURES, rank_agreement
from dha_utils.paper.linear import with_omega
from dha_utils.paper.search import omega_scores


def test_rank_agreement_is_minus_spearmans():
    random = np.random.default_rng(0)
    pairs = pd.DataFrame({measure: random.random(60) for measure in MEASURES} | {"kind": ["key", "value"] * 30})
    pairs["layer"] = np.repeat([0, 1], 30)
    pairs["divergence"] = np.exp(-pairs["spectral"])
    table = rank_agreement(pairs, resamples=200)
    assert list(table.index) == list(MEASURES)
    assert table.loc["spectral", [("key", "ρ"), ("value", "low")]].tolist() == pytest.approx([1, 1])
    pairs["divergence"] = (
        np.exp(-pairs["spectral"]) - 10 * pairs["layer"]
    )  # the layers far apart, the order in each the same
    apart = rank_agreement(pairs, resamples=200).loc["spectral", "key"]
    assert apart["in a layer"] == pytest.approx(1) and apart["ρ"] < 0.9
    others = table.drop(index="spectral")["key"]
    assert ((others["low"] <= others["ρ"]) & (others["ρ"] <= others["high"])).all() and (others["low"] < 0.2).all()


def test_copies_cost_nothing_and_strangers_something(blocks):
    planted = plant_redundancy(tiny_llama(**SHAPES["gqa"]))
    costs = measured_costs(planted, head_energies(planted, blocks[0::2]), blocks[1::2])
    assert len(costs) == 3 * 2 * 15
    for (_, _, i, j), cost in costs.items():
        copies = i // 2 == j // 2
        assert (cost["divergence"] < 1e-6) == copies
        assert not copies or abs(cost["rise"]) < 1e-4
        assert cost["standard_error"] >= 0


def test_measures_rank_a_copy_first(mha):
    weight = mha.model.layers[0].self_attn.k_proj.weight.data
    weight[:12] = 2 * weight[12:24]
    assert cosine(mha)["key"][0].fill_diagonal_(0).argmax() == 1
    alike = omega_similarity(omega_scores(with_omega(mha)), 4)["key"][0]
    assert alike.shape == (4, 4) and (alike.diagonal() == 0).all() and (alike[0, 1:] < 0).all()
