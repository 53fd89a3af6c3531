"""The search for groups and the sharing of the budget, against brute force."""

from itertools import product

import numpy as np
import pytest
import torch

from dha_utils import HeadPlan, cache_bytes, fuse, perplexity, plan_heads
from dha_utils.allocation import ALLOCATIONS, heads_for_budget, heads_for_increase, knapsack, wished_heads
from dha_utils.evaluation import log_probabilities, token_losses
from dha_utils.fusion import spectral_layers
from dha_utils.grouping import _agglomerate, best_partitions, pairwise_cost
from dha_utils.sensitivity import (
    after_refit,
    fused_in_place,
    group_heads,
    layer_inputs,
    loss_rises,
    monotone,
    partition_costs,
    plan_of_counts,
    price_table,
    read_prices,
    split_blocks,
)


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
        for (exact, _), (merged, _) in zip(best_partitions(cost, 7), _agglomerate(cost, 7)):
            assert exact - 1e-9 <= merged <= exact * 1.15 + 1e-9


def test_knapsack_is_brute_force():
    prices = monotone(torch.tensor(np.random.default_rng(1).random((2, 2, 3))))
    for heads in range(4, 13):
        least = min(
            sum(prices[i // 2, i % 2, n - 1].item() for i, n in enumerate(counts))
            for counts in product(range(1, 4), repeat=4)
            if sum(counts) == heads
        )
        counts = knapsack(prices, heads)
        assert sum(map(sum, counts)) == heads
        assert sum(
            prices[i, k, n - 1].item() for i, pair in enumerate(counts) for k, n in enumerate(pair)
        ) == pytest.approx(least)
    with pytest.raises(ValueError, match="13 heads cannot be shared"):
        knapsack(prices, 13)


def test_prices_never_rise_with_heads_and_end_at_nothing():
    prices = monotone(torch.tensor([[[0.5, 0.7, -0.1, 9.0]]]))
    assert prices.tolist() == [[[pytest.approx(0.7), pytest.approx(0.7), 0.0, 0.0]]]


def test_price_table_round_trip(tmp_path):
    prices = torch.rand(2, 2, 3, dtype=torch.float64)
    price_table(prices).to_csv(tmp_path / "prices.csv")
    assert torch.allclose(read_prices(tmp_path / "prices.csv"), prices)


def test_running_from_a_layer_on_is_running_the_whole_model(mha, blocks):
    layers = spectral_layers(mha, blocks)
    partitions = group_heads(mha, blocks, layers=layers)
    apart = [[[0], [1], [2], [3]]] * 3
    fused = fuse(mha, HeadPlan(apart[:2] + [partitions[2][0][0][1]], apart), layers=layers)
    whole = torch.stack(list(log_probabilities(fused, blocks)))
    before = mha.model.layers[2].self_attn
    with fused_in_place(mha, 2, "key", partitions[2][0][0][1], layers):
        part = torch.stack(list(log_probabilities(mha, blocks, 2, layer_inputs(mha, blocks)[2])))
        second = torch.stack(list(log_probabilities(mha, blocks, 2, layer_inputs(mha, blocks)[2], every=2)))
    assert torch.allclose(part, whole, atol=1e-4)
    assert torch.allclose(second, whole[:, ::2], atol=1e-4)
    assert mha.model.layers[2].self_attn is before


def test_measured_rises_add_up_to_what_all_layers_cost_together(mha, blocks):
    rises = loss_rises(mha, blocks)
    fitted, held_out = split_blocks(blocks)
    partitions = group_heads(mha, fitted)
    base = token_losses(mha, held_out)
    measured = []
    for n in (1, 2, 3):
        everywhere = fuse(mha, plan_of_counts(partitions, [[n, 4]] * 3), fitted)
        measured.append((token_losses(everywhere, held_out) - base)[:, ::2].mean().item())  # every second token
    assert measured[0] > 0.01 and measured[-1] > 0.01
    totals = rises[:, 0, :3].sum(0).tolist()
    assert totals[-1] == pytest.approx(measured[-1], abs=1e-4)
    for n, total in enumerate(totals):  # above only where it was forced not to rise with n, then by what more heads cost
        assert measured[n] - 1e-4 <= total <= sum(max(rise, 0) for rise in measured[n:]) + 1e-4
    assert (rises.diff(dim=-1) <= 0).all() and (rises[..., -1] == 0).all()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", ["mean", "spectral"])
def test_plans_meet_their_budget(mha, blocks, allocation, method):
    plan = plan_heads(mha, blocks, 0.5, method, allocation)
    assert plan.budget == 0.5
    assert plan.source_heads == 4
    if allocation == "uniform":
        assert set(plan.key_heads) == set(plan.value_heads) == {2}


def test_a_plan_for_the_refit_keeps_fewer_keys(mha, blocks):
    rises = loss_rises(mha, blocks)
    prices = after_refit(rises)
    assert torch.equal(prices[:, 1], rises[:, 1]) and (prices[:, 0, :-1] < rises[:, 0, :-1]).all()
    keys = [[np.sum(knapsack(price, heads), 0)[0] for heads in range(6, 25)] for price in (prices, rises)]
    assert all(few <= many for few, many in zip(*keys)) and sum(keys[0]) < sum(keys[1])
    plan = plan_heads(mha, blocks, 0.5)
    assert [list(pair) for pair in zip(plan.key_heads, plan.value_heads)] == knapsack(prices, 12)


def test_a_cache_size_is_kept_to(mha, blocks):
    head_bytes = 12 * 4
    plan = plan_heads(mha, blocks, cache_bytes=11 * head_bytes + 5, allocation="uniform")
    assert plan.heads == 11 and cache_bytes(fuse(mha, plan, blocks), 1) == 11 * head_bytes
    assert plan_heads(mha, blocks, cache_bytes=10**9, allocation="uniform").budget == 1
    with pytest.raises(ValueError, match="one value head in each of 3 layers take 288"):
        plan_heads(mha, blocks, cache_bytes=287)


def test_the_smallest_plan_within_an_increase_is_found(mha, blocks, caplog):
    caplog.set_level("INFO", "dha_utils")
    fitted, held_out = blocks[0::2], blocks[1::2]
    partitions, base = group_heads(mha, fitted), perplexity(mha, held_out)

    def counts(heads):
        return knapsack(partition_costs(partitions), heads)

    def increase(heads):
        return perplexity(fuse(mha, plan_of_counts(partitions, counts(heads)), fitted), held_out) / base - 1

    increases = {heads: increase(heads) for heads in range(6, 25)}
    for wish in (1e-3, 0.02, 0.2, 10.0):
        found = heads_for_increase(mha, fitted, held_out, wish, counts)
        assert increases[found] <= wish and (found == 6 or increases[found - 1] > wish)
        assert f"{found} heads: the perplexity rises by {100 * increases[found]:.1f} %" in caplog.text
    assert plan_heads(mha, blocks, max_increase=10.0, allocation="cost").heads == 6
    with pytest.raises(ValueError, match="a share above 0, not -0.1"):
        plan_heads(mha, blocks, max_increase=-0.1)
    with pytest.raises(ValueError, match="measured on blocks of its own"):
        wished_heads(mha, blocks, counts, max_increase=0.1)


@pytest.mark.parametrize("allocation", ["loss", "cost"])
def test_an_increase_is_measured_on_blocks_that_nothing_else_has_seen(mha, blocks, allocation, monkeypatch):
    """Other text to measure on: the same groups and prices, so with the same number of heads the same plan."""
    monkeypatch.setattr("dha_utils.allocation.heads_for_increase", lambda *arguments: 14)
    other = blocks.clone()
    other[1::2] = torch.randint(0, 96, other[1::2].shape, generator=torch.Generator().manual_seed(9))
    plans = [plan_heads(mha, text, max_increase=10.0, allocation=allocation) for text in (blocks, other)]
    assert plans[0] == plans[1] == plan_heads(mha, blocks[0::2], plans[0].budget, allocation=allocation)


@pytest.mark.parametrize("wishes", [{}, {"budget": 0.5, "max_increase": 0.1}, {"budget": 0.5, "cache_bytes": 500}])
def test_a_plan_takes_one_wish(mha, blocks, wishes):
    with pytest.raises(ValueError, match="give one of budget, cache_bytes and max_increase"):
        plan_heads(mha, blocks, **wishes)


def test_plan_is_saved_whole(mha, tmp_path):
    plan = HeadPlan.uniform(mha.config, 3, 1)
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json") == plan
    assert plan.key_groups[0] == [[0, 1], [2], [3]] and plan.value_groups[0] == [[0, 1, 2, 3]]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_bad_plans_and_budgets_are_refused(mha, blocks):
    with pytest.raises(ValueError, match="exactly once"):
        HeadPlan([[[0, 1], [1]]], [[[0], [1]]])
    with pytest.raises(ValueError, match="cannot keep 5 of 4 heads"):
        HeadPlan.uniform(mha.config, 5, 1)
    for budget in (0, -1, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            plan_heads(mha, blocks, budget)
    with pytest.raises(ValueError, match="the smallest budget for this model is 0.2500"):
        heads_for_budget(mha.config, 0.2)
    with pytest.raises(ValueError, match="at least 2 calibration blocks"):
        plan_heads(mha, blocks[:1], 0.5)
    with pytest.raises(ValueError, match="no allocation 'greedy'"):
        plan_heads(mha, blocks, 0.5, allocation="greedy")
    with pytest.raises(ValueError, match="no fusion method"):
        plan_heads(mha, blocks, 0.5, method="median")
