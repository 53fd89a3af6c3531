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


@pytest.mark.parametrize("many", [0, 10**9], ids=["a product a group", "one product"])
@given(head_map=head_maps(), new=st.integers(1, 3), batch=st.integers(1, 2))
def test_each_head_meets_the_keys_of_its_group(many, head_map, new, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MANY", many)
        query, table = torch.randn(batch, len(head_map), new, 4), QueryGroups(head_map)
        key = torch.randn(batch, table.count, 6, 4)
        assert torch.allclose(table.products(query, key), query @ key[:, head_map].mT, atol=1e-5)


@given(head_map=head_maps(), new=st.integers(1, 3))
def test_what_is_grouped_is_put_back(head_map, new):
    states, table = torch.randn(2, len(head_map), new, 3), QueryGroups(head_map)
    assert torch.equal(table.ungroup(table.grouped(states), new), states)
