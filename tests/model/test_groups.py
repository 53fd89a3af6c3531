"""Groups of query heads: gathered, multiplied and put back, each head has its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dha_utils.model import groups
from dha_utils.model.groups import QueryGroups


@st.composite
def head_maps(draw):
    """Any map of query heads without gaps: ragged, unsorted."""
    count = draw(st.integers(1, 4))
    return draw(st.permutations([*range(count), *draw(st.lists(st.integers(0, count - 1), max_size=5))]))


WAYS = {  # "MANY" and "SLOW_HALVES" of the module, dtype and tolerance
    "one product": (10**9, False, torch.float32, 1e-5),
    "a product a group": (0, False, torch.float32, 1e-5),
    "16 bits": (10**9, False, torch.bfloat16, 0.2),
    "16 bits where they are slow": (10**9, True, torch.bfloat16, 0.01),
}


@pytest.mark.parametrize("way", WAYS)
@given(head_map=head_maps(), new=st.integers(1, 3), batch=st.integers(1, 2))
def test_each_head_meets_the_keys_and_values_of_its_group(way, head_map, new, batch):
    many, slow, dtype, tolerance = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MANY", many)
        patch.setattr(groups, "SLOW_HALVES", slow)
        query, table = torch.randn(batch, len(head_map), new, 4).to(dtype), QueryGroups(head_map)
        key = torch.randn(batch, table.count, 6, 4).to(dtype)
        scores = query.float() @ key[:, head_map].float().mT
        assert torch.allclose(table.products(query, key).float(), scores, atol=tolerance)
        weights = scores.softmax(-1).to(dtype)
        mixed = table.mixtures(weights, key)
        assert mixed.dtype == dtype
        rounding = tolerance if dtype == torch.float32 else 0.02
        assert torch.allclose(mixed.float(), weights.float() @ key[:, head_map].float(), atol=rounding)


@given(head_map=head_maps(), new=st.integers(1, 3))
def test_what_is_grouped_is_put_back(head_map, new):
    states, table = torch.randn(2, len(head_map), new, 3), QueryGroups(head_map)
    assert torch.equal(table.ungroup(table.grouped(states), new), states)
