"""What the similarity benchmark calls the cost of a pair: nothing for copies in disguise, and something for strangers."""

from conftest import SHAPES, tiny_llama
from similarity import cosine, measured_costs, omega_similarity

from dha_utils import plant_redundancy
from dha_utils.linear import with_omega
from dha_utils.search import omega_scores


def test_copies_cost_nothing_and_strangers_something(blocks):
    planted = plant_redundancy(tiny_llama(**SHAPES["gqa"]))
    costs = measured_costs(planted, blocks[0::2], blocks[1::2])
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
