"""Prices: measured on running models, never rising with heads."""

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from scipy.stats import spearmanr

from dha_utils import HeadPlan, fuse, plan_heads
from dha_utils.measure.energies import head_energies
from dha_utils.measure.perplexity import log_probabilities, token_losses
from dha_utils.measure.stream import each_layer
from dha_utils.plan.allocate import knapsack
from dha_utils.plan.partition import (
    group_heads,
    monotone,
    plan_of_counts,
)
from dha_utils.plan.prices import (
    ALONE,
    PriceWalk,
    after_refit,
    head_grid,
    interpolated,
    loss_increase,
    predictions,
    price_table,
    read_prices,
    shared_in_place,
    split_blocks,
)
from dha_utils.sources.shards import open_checkpoint


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


@pytest.mark.parametrize("alone", ALONE)
def test_prices_add_up_to_the_increase_by_all_layers_together(mha, blocks, alone):
    increases = loss_increase(mha, blocks, alone=alone)
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


def test_slopes_put_layers_in_the_order_of_measured_divergences(blocks):
    model = tiny_llama(num_attention_heads=8, hidden_size=64, num_hidden_layers=4)
    divergences = {}
    for alone in ALONE:
        walk = PriceWalk(model, blocks.repeat(2, 1), alone=alone)
        divergences[alone] = torch.stack([walk.price(index, layer)[1] for index, layer in each_layer(model)]).flatten()
    assert spearmanr(*divergences.values()).statistic > 0.8


def test_many_heads_are_priced_on_a_grid_and_between():
    assert head_grid(8) == [1, 2, 3, 4, 5, 6, 7] and head_grid(1) == []
    assert head_grid(32) == [1, 2, 4, 8, 16, 24] and head_grid(64) == [1, 2, 4, 8, 16, 32, 48] and head_grid(12)[-1] == 9
    priced = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25]).expand(3, 2, 6)
    prices = interpolated(priced, head_grid(32), 32)
    assert torch.allclose(prices[..., [0, 1, 3, 7, 15, 23]], priced) and (prices.diff(dim=-1) < 0).all()
    assert (prices[..., -1] == 0).all()


def test_prices_that_overflow_are_refused():
    prices = torch.ones(3, 2, 6)
    prices[1, 0, 2] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in layers \[1\]: the model overflows on this text; give a plan"):
        interpolated(prices, head_grid(32), 32)


def test_prices_are_not_measured_on_a_model_that_is_not_there(blocks):
    model, _ = open_checkpoint("austen-mha", "cpu")
    with pytest.raises(ValueError, match="cannot be measured on a model that is read a layer at a time"):
        loss_increase(model, blocks, alone="measured")


def test_one_head_has_nothing_to_price(blocks):
    model = tiny_llama(num_attention_heads=4, num_key_value_heads=1)
    assert torch.equal(loss_increase(model, blocks), torch.zeros(3, 2, 1))
