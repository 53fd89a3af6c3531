"""The search that scales, against the exact one where that can be had, and on groups that are known."""

import pytest
import torch
from conftest import tiny_llama

from dha_utils import load_checkpoint, load_text, plant_redundancy, token_blocks
from dha_utils.fuse.model import grouped_query
from dha_utils.measure.energies import HeadEnergies, head_energies
from dha_utils.plan.many_heads import Groups, ValueGroups, many_partitions
from dha_utils.plan.partition import best_partitions, layer_partitions


def near_the_optimum(energies):
    """Asserts that keys and values cost at most 5 % more than the exact optimum, for every number of heads."""
    key_cost, value_cost = energies.costs()
    heads = len(energies.query_weight)
    for groups, cost in ((Groups(key_cost, heads), key_cost), (ValueGroups(energies), value_cost)):
        for n, ((fast, found), (exact, _)) in enumerate(
            zip(many_partitions(groups), best_partitions(cost, heads)), start=1
        ):
            assert sorted(sum(found, [])) == list(range(heads)) and len(found) == n
            assert fast == pytest.approx(sum(cost(tuple(group)) for group in found), rel=1e-3, abs=1e-6)
            assert exact - 1e-6 <= fast <= 1.05 * exact + 1e-6


@pytest.fixture(scope="module")
def trained():
    model, tokenizer = load_checkpoint("austen-mha")
    return model, token_blocks(tokenizer, load_text("austen", "train"), 256, 16)


def test_near_the_optimum_on_a_trained_model(trained):
    for energies in head_energies(*trained)[::2]:
        near_the_optimum(energies)


def test_near_the_optimum_on_a_planted_model(trained):
    model, blocks = trained
    for energies in head_energies(plant_redundancy(grouped_query(model, blocks)), blocks)[1::2]:
        near_the_optimum(energies)


@pytest.mark.parametrize("copies", [2, 4])
def test_near_the_optimum_on_planted_groups(copies):
    random = tiny_llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=8 // copies)
    planted = plant_redundancy(random)
    for energies in head_energies(planted, torch.randint(0, 96, (8, 64))):
        near_the_optimum(energies)


def test_sixteen_planted_heads_are_found_in_their_four_groups():
    model = plant_redundancy(tiny_llama(hidden_size=64, num_attention_heads=16, num_key_value_heads=4, head_dim=8))
    neighbours = [list(range(start, start + 4)) for start in range(0, 16, 4)]
    energies = head_energies(model, torch.randint(0, 96, (8, 64)))
    for index, layer in enumerate(model.model.layers):
        for kind in layer_partitions(layer.self_attn, energies[index]):
            assert kind[3][1] == neighbours and kind[3][0] < 1e-5 < kind[2][0]
            assert [len(groups) for _, groups in kind] == list(range(1, 17))


def test_heads_of_nothing_cost_nothing():
    nothing = torch.zeros(12, 4, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64).repeat(12, 1, 1)
    energies = HeadEnergies(nothing, torch.zeros(4, 12, 12, dtype=torch.complex128), torch.zeros(96, 96).double(), eye)
    key_cost, _ = energies.costs()
    for groups in (Groups(key_cost, 12), ValueGroups(energies)):
        assert [cost for cost, _ in many_partitions(groups)] == [0.0] * 12
