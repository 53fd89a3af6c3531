"""What must hold on smollm2-135m (`make test-slow`): 4,096 tokens to calibrate, 4,096 to validate, blocks of 512."""

import copy

import pytest
import torch
from conftest import logits

from dha_utils import HeadPlan, fuse, load_checkpoint, load_text, perplexity, plant_redundancy, token_blocks
from dha_utils.measure.energies import head_energies
from dha_utils.plan.allocate import heads_for_budget, knapsack
from dha_utils.plan.partition import group_heads, plan_of_counts
from dha_utils.plan.prices import loss_increase
from dha_utils.sources.precision import cast_weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint():
    model, tokenizer = load_checkpoint("smollm2-135m")
    splits = [token_blocks(tokenizer, load_text("wikipedia", split), 512, 8) for split in ("train", "validation")]
    return model, *splits


def test_perplexity_without_training(checkpoint):
    model, calibration, validation = checkpoint
    assert perplexity(model, validation) == pytest.approx(23.68, rel=0.01)
    energies = head_energies(model, calibration)
    partitions = group_heads(model, calibration, energies=energies)
    increases = loss_increase(model, calibration)
    for budget, most in ((1 / 3, 104), (0.5, 53), (2 / 3, 38)):
        plan = plan_of_counts(partitions, knapsack(increases, heads_for_budget(model.config, budget)))
        assert plan.budget == pytest.approx(budget)
        assert perplexity(fuse(model, plan, energies=energies), validation) <= most
    pooled = fuse(model, HeadPlan.uniform(model.config, 1, 1), method="mean")
    assert perplexity(pooled, validation) > 5000


def test_planted_redundancy_is_fused_back(checkpoint):
    model, calibration, validation = checkpoint
    planted = plant_redundancy(model)
    assert torch.allclose(logits(planted, validation[:1]), logits(model, validation[:1]), atol=1e-3)
    energies = head_energies(planted, calibration[:4])
    partitions = group_heads(planted, calibration, energies=energies)
    plan = plan_of_counts(partitions, [[3, 3]] * 30)
    assert plan.key_groups == plan.value_groups == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]] * 30
    fused = fuse(planted, plan, energies=energies)
    assert torch.allclose(logits(fused, validation[:1]), logits(model, validation[:1]), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_source_is_fused_like_the_float32_one(checkpoint, dtype):
    """Activations of layers 12 and 19 have squares beyond float16."""
    model, calibration, validation = checkpoint
    plan, text = HeadPlan.uniform(model.config, 2, 2), calibration[:2].view(1, 1024)
    low = cast_weights(copy.deepcopy(model), dtype)
    fused = fuse(low, plan, text)
    assert all(weight.isfinite().all() for weight in fused.parameters())
    expected = perplexity(fuse(model, plan, text), validation[:2])
    assert perplexity(cast_weights(fused, torch.float32), validation[:2]) == pytest.approx(expected, rel=0.02)
