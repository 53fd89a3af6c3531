"""The sharing of the budget, against brute force, and the targets."""

from functools import partial
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch

from dha_utils import cache_bytes, fuse, perplexity, plan_heads
from dha_utils.plan.allocate import (
    ALLOCATIONS,
    fitted_and_measured,
    heads_for_increase,
    knapsack,
    shared_losses,
    target_heads,
)
from dha_utils.plan.partition import (
    group_heads,
    monotone,
    partition_costs,
    plan_of_counts,
)


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


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", ["mean", "spectral"])
def test_plans_meet_their_budget(mha, blocks, allocation, method):
    plan = plan_heads(mha, blocks, 0.5, method, allocation)
    assert plan.budget == 0.5
    assert plan.source_heads == 4
    if allocation == "uniform":
        assert set(plan.key_heads) == set(plan.value_heads) == {2}


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
    for target in (1e-3, 0.02, 0.2, 10.0):
        found = heads_for_increase(mha, fitted, held_out, target, counts)
        assert increases[found] <= target and (found == 6 or increases[found - 1] > target)
        assert f"{found} heads: the perplexity rises by {100 * increases[found]:.1f} %" in caplog.text
    assert plan_heads(mha, blocks, max_increase=10.0, allocation="cost").heads == 6
    with pytest.raises(ValueError, match="a share above 0, not -0.1"):
        plan_heads(mha, blocks, max_increase=-0.1)
    with pytest.raises(ValueError, match="measured on blocks of its own"):
        target_heads(mha, blocks, counts, max_increase=0.1)


def test_a_search_by_increase_that_was_killed_measures_nothing_twice(mha, blocks, tmp_path, monkeypatch):
    module, measured = import_module("dha_utils.plan.allocate"), []
    partitions, memory = group_heads(mha, blocks[0::2]), tmp_path / "increases.json"

    def search(limit):
        left = limit

        def losses(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            measured.append(arguments)
            return shared_losses(*arguments)

        monkeypatch.setattr(module, "shared_losses", losses)
        counts = partial(knapsack, partition_costs(partitions))
        return heads_for_increase(mha, blocks[0::2], blocks[1::2], 0.02, counts, partitions=partitions, memory=memory)

    whole = search(99)
    needed = len(measured)
    memory.unlink(), measured.clear()
    with pytest.raises(KeyboardInterrupt):
        search(needed - 2)
    assert search(2) == search(0) == whole and len(measured) == needed


@pytest.mark.parametrize("allocation", ["loss", "cost"])
def test_an_increase_is_measured_on_blocks_that_nothing_else_has_seen(mha, blocks, allocation, monkeypatch):
    """Other text to measure on: the same groups and prices, so with the same number of heads the same plan."""
    monkeypatch.setattr("dha_utils.plan.allocate.heads_for_increase", lambda *arguments: 14)
    other = blocks.clone()
    other[1::2] = torch.randint(0, 96, other[1::2].shape, generator=torch.Generator().manual_seed(9))
    plans = [plan_heads(mha, text, max_increase=10.0, allocation=allocation) for text in (blocks, other)]
    assert plans[0] == plans[1] == plan_heads(mha, blocks[0::2], plans[0].budget, allocation=allocation)


@pytest.mark.parametrize("targets", [{}, {"budget": 0.5, "max_increase": 0.1}, {"budget": 0.5, "cache_bytes": 500}])
def test_a_plan_takes_one_target(mha, blocks, targets):
    with pytest.raises(ValueError, match="give one of budget, cache_bytes and max_increase"):
        plan_heads(mha, blocks, **targets)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_takes_an_increase(mha, blocks, allocation):
    """Prices want gradients, also where nothing else does."""
    loose, tight = (plan_heads(mha, blocks, max_increase=share, allocation=allocation).heads for share in (10.0, 1e-3))
    assert 6 == loose < tight <= 24


def test_an_increase_is_measured_on_running_text(blocks):
    """Where text repeats itself fewer heads lose more: more of them would be kept for the same wish."""
    half, blocks = blocks.shape[1] // 2, blocks[:6].clone()
    blocks[:2, half:] = blocks[:2, :half]
    fitted, measured = fitted_and_measured(blocks)
    assert torch.equal(fitted, blocks[0::2]) and torch.equal(measured, blocks[[3, 5]])
    with pytest.raises(ValueError, match="measured on running text, but all calibration blocks for it repeat themselves"):
        fitted_and_measured(blocks[[0, 1, 0, 1]])
