"""Head plans: saved whole, refused when they are none."""

import pytest

from dha_utils import HeadPlan, plan_heads
from dha_utils.plan.allocate import heads_for_budget


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
