"""The paper's learned linear fusion: a start that changes nothing, L_fusion as in Eq. 6-7, an exact collapse."""

from itertools import combinations

import pytest
import torch
from conftest import SHAPES, killed_at_step, logits, tiny_llama

from dha_utils import HeadPlan, perplexity
from dha_utils.paper.linear import collapse, fusion_terms, learn_fusion, omegas, with_omega
from dha_utils.recover.training import training_log


@pytest.fixture(params=[True, False], ids=["per dimension", "scalar"])
def per_dimension(request):
    return request.param


def plan_for(model):
    heads = model.config.num_key_value_heads
    return HeadPlan.uniform(model.config, 2 if heads > 2 else 1, 1)


@torch.no_grad()
def scramble(mixed, plan, agree):
    """Random ω; with `agree`, the same rows for all query heads of a group."""
    random = torch.Generator().manual_seed(1)
    queries = mixed.config.num_attention_heads // mixed.config.num_key_value_heads
    for layer, pair in enumerate(omegas(mixed)):
        for omega, groups in zip(pair, (plan.key_groups[layer], plan.value_groups[layer])):
            omega.copy_(torch.randn(omega.shape, generator=random))
            for group in groups if agree else ():
                rows = [head * queries + i for head in group for i in range(queries)]
                omega[rows] = omega[rows[0]].clone()


def test_omega_at_the_identity_changes_nothing(model, blocks, per_dimension):
    for plan in (None, plan_for(model)):
        mixed = with_omega(model, plan, per_dimension)
        assert (logits(mixed, blocks) - logits(model, blocks)).abs().max() < 1e-5
    d = model.config.head_dim if per_dimension else 1
    shape = (model.config.num_attention_heads, model.config.num_key_value_heads, d)
    assert all(omega.shape == shape for pair in omegas(mixed) for omega in pair)


def test_the_collapsed_model_agrees_once_the_rows_do(model, blocks, per_dimension):
    plan = plan_for(model)
    mixed = with_omega(model, plan, per_dimension)
    scramble(mixed, plan, agree=True)
    collapsed = collapse(mixed, plan)
    assert collapsed.config.budget == plan.budget
    assert (logits(collapsed, blocks) - logits(mixed, blocks)).abs().max() < 1e-4
    assert (logits(mixed, blocks) - logits(model, blocks)).abs().max() > 1e-2


def test_heads_outside_the_group_are_out_of_reach(mha, blocks):
    plan = HeadPlan.uniform(mha.config, 2, 2)
    mixed = with_omega(mha, plan)
    with torch.no_grad():
        omegas(mixed)[0][0][0, 3] += 5  # query head 0 is in the group of heads 0 and 1
    assert torch.equal(logits(mixed, blocks), logits(with_omega(mha, plan), blocks))


def test_fusion_loss_is_the_sum_over_pairs(model, per_dimension):
    plan = plan_for(model)
    mixed = with_omega(model, plan, per_dimension)
    scramble(mixed, plan, agree=False)
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    expected = []
    for layer, pair in enumerate(omegas(mixed)):
        for omega, groups in zip(pair, (plan.key_groups[layer], plan.value_groups[layer])):
            for group in groups:
                rows = [omega[head * queries + i] for head in group for i in range(queries)]
                pairs = combinations(rows, 2)
                expected.append(sum((a - b).square().mean(-1).sum() for a, b in pairs) / len(rows))
    torch.testing.assert_close(fusion_terms(mixed, plan), torch.stack(expected))


def test_fusion_loss_by_hand(mha):
    keys = HeadPlan([[[0, 1], [2], [3]]] * 3, [[[0], [1], [2], [3]]] * 3)
    mixed = with_omega(mha, keys)
    # heads 0 and 1 at the identity: rows (1, 0) and (0, 1), squared distance 2, over g = 2; a head alone costs nothing
    assert fusion_terms(mixed, keys).tolist() == [1.0, 0, 0, 0, 0, 0, 0] * 3
    with torch.no_grad():
        for key, _ in omegas(mixed):
            key[:2] = 0.5
    assert fusion_terms(mixed, keys).sum() == 0
    with torch.no_grad():
        omegas(mixed)[1][0][0, 1] += 2.0  # one entry of one row differs by 2: 4 / 2
    assert fusion_terms(mixed, keys).sum().item() == pytest.approx(2.0)


def test_identity_of_groups_of_four_is_the_72_of_the_paper_shape():
    mha = tiny_llama(num_attention_heads=8, num_key_value_heads=8, head_dim=8, num_hidden_layers=6)
    plan = HeadPlan.uniform(mha.config, 2, 2)
    assert fusion_terms(with_omega(mha, plan), plan).sum().item() == pytest.approx(72)


@pytest.mark.parametrize("hinge", ["sum", "term"])
def test_learning_draws_the_rows_together_and_stops(mha, blocks, tmp_path, hinge):
    plan = HeadPlan.uniform(mha.config, 2, 1)

    def run():
        settings = {"hinge": hinge, "tokens_per_step": 64, "validation": blocks, "output_dir": tmp_path}
        return learn_fusion(mha, plan, blocks, 64 * 400, **settings)

    fused = run()
    log = training_log(tmp_path)
    assert log["fusion_loss"].iloc[-1] < 1e-3 and log["step"].iloc[-1] < 400
    assert log["target"].dropna().is_monotonic_decreasing and log["multiplier"].iloc[-1] > 0
    assert log["collapsed_perplexity"].iloc[-1] == pytest.approx(log["perplexity"].iloc[-1], rel=0.1)
    assert perplexity(fused, blocks) == pytest.approx(log["collapsed_perplexity"].iloc[-1], rel=1e-4)
    assert fused.config.budget == plan.budget
    again = run()
    assert training_log(tmp_path).equals(log)
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), again.parameters()))


def test_rows_that_still_differ_are_reported(mha, blocks, tmp_path, caplog):
    learn_fusion(mha, HeadPlan.uniform(mha.config, 2, 2), blocks, 64, tokens_per_step=64, output_dir=tmp_path)
    assert "L_fusion is still" in caplog.text and training_log(tmp_path)["fusion_loss"].iloc[-1] > 1


def test_interrupted_learning_ends_where_a_whole_run_does(mha, blocks, tmp_path):
    plan = HeadPlan.uniform(mha.config, 2, 1)

    def run(folder):
        return learn_fusion(mha, plan, blocks, 64 * 20, tokens_per_step=64, output_dir=folder)

    whole = run(tmp_path / "whole")
    with killed_at_step(mha, 13):
        run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert training_log(tmp_path / "cut")["multiplier"].iloc[-1] > 0


def test_bad_requests_are_refused(mha, blocks):
    with pytest.raises(ValueError, match="no hinge 'max': choose one of sum, term"):
        learn_fusion(mha, HeadPlan.uniform(mha.config, 2, 2), blocks, 64, hinge="max")
    other = tiny_llama(**SHAPES["gqa"]).config
    with pytest.raises(ValueError, match="make a plan for this model"):
        learn_fusion(mha, HeadPlan.uniform(other, 1, 1), blocks, 64)
