"""The paper's search: scores of ω, annealing against enumeration, L_fusion as the price of a plan."""

from itertools import combinations

import numpy as np
import pytest
import torch

from dha_utils import HeadPlan
from dha_utils.paper.linear import fusion_terms, omegas, with_omega
from dha_utils.paper.search import anneal, fusion_cost, greedy, omega_scores, score_partitions, search_scores
from dha_utils.plan.allocate import knapsack
from dha_utils.plan.partition import best_partitions, partition_costs, plan_of_counts


def equal_partitions(heads, size):
    """All partitions into groups of `size`, by brute force."""
    if not heads:
        yield []
        return
    for others in combinations(heads[1:], size - 1):
        group = (heads[0], *others)
        for rest in equal_partitions([head for head in heads if head not in group], size):
            yield [list(group), *rest]


def random_scores(heads, seed):
    points = np.random.default_rng(seed).random((heads, 5))
    return ((points[:, None] - points) ** 2).sum(-1)


@pytest.mark.parametrize("n", [2, 4])
def test_annealing_finds_the_best_of_all_equal_partitions(n):
    for seed in range(20):
        cost = fusion_cost(random_scores(8, seed), 8)
        least = min(sum(map(cost, groups)) for groups in equal_partitions(list(range(8)), 8 // n))
        total, groups = anneal(cost, 8, n, seed)
        assert total == pytest.approx(least)
        assert sum(map(cost, groups)) == pytest.approx(total)


def test_annealing_minimises():
    owner = np.array([0, 1, 0, 1, 1, 0, 1, 0])
    cost = fusion_cost((owner[:, None] != owner).astype(float), 8)
    assert anneal(cost, 8, 2)[1] == [[0, 2, 5, 7], [1, 3, 4, 6]]


@pytest.mark.parametrize("grouping", ["annealing", "search"])
def test_partitions_cost_their_fusion_loss(model, grouping):
    heads = model.config.num_key_value_heads
    mixed = with_omega(model)
    with torch.no_grad():
        for index, omega in enumerate(omega for pair in omegas(mixed) for omega in pair):
            omega.normal_(generator=torch.Generator().manual_seed(index))
    partitions = score_partitions(omega_scores(mixed), heads, grouping)
    for n in range(1, heads + 1):
        plan = plan_of_counts(partitions, [[n, n]] * len(partitions))
        expected = sum(cost for layer in partitions for cost, _ in (layer[0][n - 1], layer[1][n - 1]))
        assert fusion_terms(mixed, plan).sum().item() == pytest.approx(expected, rel=1e-5)


def test_free_sizes_are_never_worse_than_equal_ones():
    scores = {"key": torch.tensor(random_scores(6, 1))[None], "value": torch.tensor(random_scores(6, 2))[None]}
    equal, free = (partition_costs(score_partitions(scores, 6, grouping)) for grouping in ("annealing", "search"))
    assert (free <= equal + 1e-9).all()
    assert best_partitions(fusion_cost(scores["key"][0], 6), 6)[2][0] == pytest.approx(float(free[0, 0, 2]))


def test_search_leaves_the_model_and_keeps_its_scores(mha, blocks, tmp_path):
    before = [parameter.clone() for parameter in mha.parameters()]
    history = search_scores(mha, blocks, steps=12, tokens_per_step=64, snapshots=3, output_dir=tmp_path)
    assert list(history) == [0, 4, 8, 12]
    assert all(torch.equal(a, b) for a, b in zip(before, mha.parameters()))
    identity = 2 * (1 - torch.eye(4))
    torch.testing.assert_close(history[0]["key"], identity.expand(3, 4, 4))
    assert (history[12]["value"] - history[0]["value"]).abs().max() > 1e-3
    again = search_scores(mha, blocks, steps=12, tokens_per_step=64, snapshots=3, output_dir=tmp_path)
    assert all(torch.equal(again[12][kind], history[12][kind]) for kind in ("key", "value"))


def test_greedy_hands_out_halves_to_the_highest():
    prices = np.zeros((2, 2, 8))
    prices[..., 0] = [[1, 4], [3, 2]]
    assert greedy(prices, 4) == [[1, 1], [1, 1]]
    assert greedy(prices, 4 + 4 + 2) == [[1, 5], [3, 1]]
    assert sum(map(sum, greedy(prices, 31))) == 31
    with pytest.raises(ValueError, match="33 heads cannot be shared among 4 places of 1 to 8 heads"):
        greedy(prices, 33)


def test_the_knapsack_is_never_dearer_than_the_greedy():
    random = np.random.default_rng(0)
    for heads in range(12, 40, 5):
        prices = np.sort(random.random((5, 2, 4)))[..., ::-1]

        def price(counts, prices=prices):
            return sum(prices[i, kind, n - 1] for i, pair in enumerate(counts) for kind, n in enumerate(pair))

        assert price(knapsack(prices, heads)) <= price(greedy(prices, heads)) + 1e-12


def test_both_ways_give_a_head_plan(mha, blocks, tmp_path):
    history = search_scores(mha, blocks, steps=2, tokens_per_step=64, snapshots=1, output_dir=tmp_path)
    partitions = score_partitions(history[2], 4)
    plan = plan_of_counts(partitions, knapsack(partition_costs(partitions), 12))
    assert isinstance(plan, HeadPlan) and plan.heads == 12
    with pytest.raises(ValueError, match="no grouping 'kmeans': choose one of annealing, search"):
        score_partitions(history[2], 4, "kmeans")


def test_runs_in_one_folder_keep_their_own_scores(mha, blocks, tmp_path):
    def run(seed):
        return search_scores(mha, blocks, 4, tokens_per_step=32, seed=seed, snapshots=2, output_dir=tmp_path)[4]["key"]

    first, second = run(0), run(1)
    assert not torch.equal(first, second) and torch.equal(run(0), first)
