"""The search for groups, against brute force."""

import numpy as np
import pytest

from dha_utils.measure.energies import head_energies
from dha_utils.plan.many_heads import Groups, many_partitions
from dha_utils.plan.partition import best_partitions, cheapest_pair, group_heads, pair_costs, pairwise_cost


def test_partition_costs_fall_with_heads(mha, blocks):
    for layer in group_heads(mha, blocks):
        for kind in layer:
            costs = [cost for cost, _ in kind]
            assert costs == sorted(costs, reverse=True) and costs[-1] < 1e-5


def test_the_cheapest_pair_is_the_first_that_the_search_joins(mha, blocks):
    layer = len(mha.model.layers) - 1
    tables = pair_costs(head_energies(mha, blocks), [layer])
    for searched, table in zip(group_heads(mha, blocks)[layer], tables.values()):
        cost, groups = searched[-2]
        [pair] = [group for group in groups if len(group) == 2]
        assert cheapest_pair(table[layer]) == tuple(pair)
        assert table[layer][tuple(pair)] == table[layer].T[tuple(pair)] == pytest.approx(cost, abs=1e-5)
    assert cheapest_pair(np.zeros((1, 1))) == ()


def test_energies_do_not_decide_where_heads_are_pooled(mha, blocks):
    pooled = group_heads(mha, blocks, "mean")
    assert group_heads(mha, blocks, "mean", head_energies(mha, blocks)) == pooled != group_heads(mha, blocks)


def partitions_of(heads):
    """Every partition of a list, by hand."""
    if not heads:
        yield []
        return
    first, *rest = heads
    for partition in partitions_of(rest):
        yield [[first], *partition]
        for i in range(len(partition)):
            yield [*partition[:i], [first, *partition[i]], *partition[i + 1 :]]


def random_costs(heads, seed):
    matrix = np.random.default_rng(seed).random((heads, heads))
    return pairwise_cost(matrix + matrix.T)


@pytest.mark.parametrize("seed", range(3))
def test_exact_search_is_brute_force(seed):
    cost = random_costs(6, seed)
    everything = list(partitions_of(list(range(6))))
    for n, (total, groups) in enumerate(best_partitions(cost, 6), start=1):
        least = min(sum(cost(tuple(g)) for g in partition) for partition in everything if len(partition) == n)
        assert len(groups) == n and total == pytest.approx(least) == sum(cost(tuple(g)) for g in groups)


def test_merging_finds_clear_groups_beyond_enumeration():
    owner = np.random.default_rng(0).permutation(np.repeat(range(4), 4))
    distance = (owner[:, None] != owner).astype(float)
    total, groups = best_partitions(pairwise_cost(distance), 16)[3]
    assert total == 0 and sorted(groups) == sorted(np.flatnonzero(owner == g).tolist() for g in range(4))


def test_merging_is_near_the_optimum():
    for seed in range(5):
        cost = random_costs(7, seed)
        for (exact, _), (merged, _) in zip(best_partitions(cost, 7), many_partitions(Groups(cost, 7))):
            assert exact - 1e-9 <= merged <= exact * 1.15 + 1e-9
