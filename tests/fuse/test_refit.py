"""The refit lowers the error of each layer on text it has not seen, or leaves the layer alone."""

from importlib import import_module

import pytest
import torch
from conftest import logits

from dha_utils import HeadPlan, fuse, plant_redundancy
from dha_utils.fuse.refit import refit
from dha_utils.measure.stream import after_attention, after_layer, each_block


def plan_for(model):
    return HeadPlan.uniform(model.config, max(1, model.config.num_key_value_heads // 2), 1)


@torch.no_grad()
def with_spoilt_output(model):
    alone = [[head] for head in range(model.config.num_key_value_heads)]
    spoilt = fuse(model, HeadPlan([alone] * 3, [alone] * 3), method="mean")
    for layer in spoilt.model.layers:
        layer.self_attn.o_proj.weight.mul_(1.5)
    return spoilt


MODULE = import_module("dha_utils.fuse.refit")  # `dha_utils.fuse` itself is the function


@pytest.mark.parametrize("layer_epochs, part", [(0, ".self_attn."), (2, ".layers.")])
def test_refit_brings_the_fused_model_nearer_to_its_source(model, layer_epochs, part):
    blocks = torch.randint(0, 96, (64, 32), generator=torch.Generator().manual_seed(3))
    fused = fuse(model, plan_for(model), blocks)
    before = [parameter.clone() for parameter in fused.parameters()]
    refitted, errors = refit(fused, model, blocks, layer_epochs=layer_epochs)
    kept = errors["kept"].unstack()
    assert kept["attention"].all() and (kept["layer"].all() if layer_epochs else not kept["layer"].any())
    assert (errors["after"] < errors["before"]).equals(errors["kept"])
    unseen = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(4))
    target = logits(model, unseen)
    assert (logits(refitted, unseen) - target).square().mean() < (logits(fused, unseen) - target).square().mean()
    assert all(torch.equal(a, b) for a, b in zip(before, fused.parameters()))
    moved = {name for name, weight in refitted.state_dict().items() if not torch.equal(weight, fused.state_dict()[name])}
    assert moved and all(part in name for name in moved)


def test_a_round_that_serves_well_is_followed_by_another(mha, blocks, monkeypatch):
    """Of the first stage, whose random choices are the same."""
    spoilt = with_spoilt_output(mha)
    more = refit(spoilt, mha, blocks)[1].iloc[0]
    monkeypatch.setattr(MODULE, "WELL", 0)
    one = refit(spoilt, mha, blocks)[1].iloc[0]
    assert one["after"] < 0.9 * one["before"] and more["after"] < one["after"]


def test_a_stage_whose_error_does_not_fall_is_undone(mha, blocks, monkeypatch):
    monkeypatch.setattr(MODULE, "RIDGES", (-1.0,))  # pushes away from the best
    fused = fuse(mha, plan_for(mha), blocks)
    refitted, errors = refit(fused, mha, blocks, epochs=2, learning_rate=30.0, layer_learning_rate=30.0)
    assert not errors["kept"].any() and (errors["after"] == errors["before"]).all()
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), refitted.parameters()))


def test_the_output_is_solved_where_a_solution_exists(mha, blocks):
    """With all heads kept and another o_proj, least squares finds the source's own again."""
    spoilt = with_spoilt_output(mha)
    refitted, errors = refit(spoilt, mha, blocks, epochs=0, layer_epochs=0)
    assert errors["kept"].unstack()["output"].all()
    fallen = errors["after"] / errors["before"]
    assert (fallen.unstack()["output"] < 0.01).all(), fallen
    assert (logits(refitted, blocks) - logits(mha, blocks)).square().mean() < 0.01 * (
        logits(spoilt, blocks) - logits(mha, blocks)
    ).square().mean()


def test_a_lossless_fusion_stays_lossless(gqa, blocks):
    planted = plant_redundancy(gqa)
    heads = planted.config.num_attention_heads
    groups = [[list(range(i, i + 2)) for i in range(0, heads, 2)]] * 3
    fused = fuse(planted, HeadPlan(groups, groups), blocks)
    refitted, errors = refit(fused, planted, blocks)
    assert (errors["after"] <= errors["before"]).all()
    assert (logits(refitted, blocks) - logits(planted, blocks)).abs().max() < 1e-3


def test_states_are_those_of_the_model(mha, blocks):
    with torch.no_grad():
        expected = mha.model(blocks, output_hidden_states=True).hidden_states
        states = mha.model.embed_tokens(blocks)
        turns = mha.model.rotary_emb(states, torch.arange(32)[None])
    for index, layer in enumerate(mha.model.layers):
        assert (states - expected[index]).abs().max() < 1e-4
        captured = []
        hook = layer.self_attn.register_forward_hook(lambda module, args, output, kept=captured: kept.append(output[0]))
        behind = each_block(after_attention, layer, states, turns)
        each_block(after_layer, layer, expected[index], turns)
        hook.remove()
        assert (states + torch.cat(captured[len(blocks) :]) - behind).abs().max() < 1e-4
        states = each_block(after_layer, layer, states, turns)


def test_too_little_text_is_refused(mha, blocks):
    with pytest.raises(ValueError, match="at least 4 calibration blocks"):
        refit(fuse(mha, plan_for(mha), method="mean"), mha, blocks[:3])
