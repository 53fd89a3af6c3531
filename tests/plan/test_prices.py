"""Prices: measured on running models, never rising with heads."""

import numpy as np
import pytest
import torch

from dha_utils import HeadPlan, fuse, plan_heads
from dha_utils.measure.energies import head_energies
from dha_utils.measure.perplexity import log_probabilities, token_losses
from dha_utils.plan.allocate import knapsack
from dha_utils.plan.partition import (
    group_heads,
    monotone,
    plan_of_counts,
)
from dha_utils.plan.prices import (
    after_refit,
    loss_increase,
    predictions,
    price_table,
    read_prices,
    shared_in_place,
    split_blocks,
)


def test_prices_never_rise_with_heads_and_end_at_nothing():
    prices = monotone(torch.tensor([[[0.5, 0.7, -0.1, 9.0]]]))
    assert prices.tolist() == [[[pytest.approx(0.7), pytest.approx(0.7), 0.0, 0.0]]]


def test_price_table_round_trip(tmp_path):
    prices = torch.rand(2, 2, 3, dtype=torch.float64)
    price_table(prices).to_csv(tmp_path / "prices.csv")
    assert torch.allclose(read_prices(tmp_path / "prices.csv"), prices)


def test_running_from_a_layer_on_is_running_the_whole_model(mha, blocks):
    energies = head_energies(mha, blocks)
    partitions = group_heads(mha, blocks, energies=energies)
    apart = [[[0], [1], [2], [3]]] * 3
    fused = fuse(mha, HeadPlan(apart[:2] + [partitions[2][0][0][1]], apart), energies=energies)
    whole = torch.stack(list(log_probabilities(fused, blocks)))
    before = mha.model.layers[2].self_attn
    entering = mha.model(blocks, output_hidden_states=True).hidden_states[2]
    with torch.no_grad(), shared_in_place(mha.config, mha.model.layers[2], partitions[2][0][0][1], apart[2], energies[2]):
        part, second = predictions(mha, 2, entering, every=1), predictions(mha, 2, entering)
    assert torch.allclose(part, whole, atol=1e-4)
    assert torch.allclose(second, whole[:, ::2], atol=1e-4)
    assert mha.model.layers[2].self_attn is before


def test_measured_rises_add_up_to_what_all_layers_cost_together(mha, blocks):
    increases = loss_increase(mha, blocks)
    fitted, held_out = split_blocks(blocks)
    partitions = group_heads(mha, fitted)
    base = token_losses(mha, held_out)
    measured = []
    for n in (1, 2, 3):
        everywhere = fuse(mha, plan_of_counts(partitions, [[n, 4]] * 3), fitted)
        measured.append((token_losses(everywhere, held_out) - base)[:, ::2].mean().item())  # every second token
    assert measured[0] > 0.01 and measured[-1] > 0.01
    totals = increases[:, 0, :3].sum(0).tolist()
    assert totals[-1] == pytest.approx(measured[-1], abs=1e-4)
    for n, total in enumerate(totals):  # above only where it was forced not to rise with n, then by what more heads cost
        assert measured[n] - 1e-4 <= total <= sum(max(rise, 0) for rise in measured[n:]) + 1e-4
    assert (increases.diff(dim=-1) <= 0).all() and (increases[..., -1] == 0).all()


def test_a_plan_for_the_refit_keeps_fewer_keys(mha, blocks):
    increases = loss_increase(mha, blocks)
    prices = after_refit(increases)
    assert torch.equal(prices[:, 1], increases[:, 1]) and (prices[:, 0, :-1] < increases[:, 0, :-1]).all()
    keys = [[np.sum(knapsack(price, heads), 0)[0] for heads in range(6, 25)] for price in (prices, increases)]
    assert all(few <= many for few, many in zip(*keys)) and sum(keys[0]) < sum(keys[1])
    plan = plan_heads(mha, blocks, 0.5)
    assert [list(pair) for pair in zip(plan.key_heads, plan.value_heads)] == knapsack(prices, 12)
