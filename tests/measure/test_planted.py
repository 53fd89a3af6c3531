"""The freedoms of attention, and a checkpoint whose redundancy was planted."""

import pytest
import torch
from conftest import logits

from dha_utils import fuse, plan_heads, plant_redundancy
from dha_utils.measure.planted import apply_freedoms


def test_freedoms_leave_the_logits(model, blocks):
    assert torch.allclose(logits(apply_freedoms(model), blocks), logits(model, blocks), atol=1e-4)


@pytest.mark.parametrize("free_frequencies", [True, False])
def test_planted_redundancy_is_found_and_fused_back(gqa, blocks, free_frequencies):
    planted = plant_redundancy(gqa, seed=3)
    assert planted.config.num_key_value_heads == gqa.config.num_attention_heads
    assert torch.allclose(logits(planted, blocks), logits(gqa, blocks), atol=1e-4)

    plan = plan_heads(planted, blocks, budget=0.5, allocation="uniform")
    assert plan.key_groups == plan.value_groups == [[[0, 1], [2, 3], [4, 5]]] * 3
    assert plan.budget == 0.5
    fused = fuse(planted, plan, blocks, free_frequencies=free_frequencies)
    assert torch.allclose(logits(fused, blocks), logits(gqa, blocks), atol=1e-4)

    pooled = fuse(planted, plan, method="mean")
    assert (logits(pooled, blocks) - logits(gqa, blocks)).abs().max() > 0.1


def test_planting_needs_shared_heads(mha):
    with pytest.raises(ValueError, match="grouped-query"):
        plant_redundancy(mha)
