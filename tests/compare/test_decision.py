"""The decision: an interval on one side of its limit decides, one across it does not."""

import numpy as np
import pytest

from dha_utils.compare.decision import CANNOT_TELL, GO, NO_GO, decision, gate


@pytest.mark.parametrize(
    ("low", "high", "most", "verdict"),
    [
        (0.0, 0.1, True, GO),
        (0.1, 0.2, True, CANNOT_TELL),
        (0.11, 0.2, True, NO_GO),
        (0.1, 0.2, False, GO),
        (0.0, 0.1, False, CANNOT_TELL),
        (0.0, 0.09, False, NO_GO),
        (np.nan, np.nan, True, NO_GO),
    ],
)
def test_the_interval_decides(low, high, most, verdict):
    assert gate((low + high) / 2, low, high, 0.1, most)["verdict"] == verdict


def test_how_many_more_items_would_tell():
    """With as many, the interval just reaches the limit."""
    row = gate(0.75, 0.5, 1.0, 0.625, items=100)
    assert row["items that would tell"] == 400
    assert gate(0.1, 0.0, 0.2, 0.1, items=100)["items that would tell"] is None, "no number does: it is on the limit"
    assert gate(0.0, 0.0, 0.0, 0.1, items=100)["items that would tell"] is None


def test_one_gate_is_enough_to_stop():
    good, bad, open_ = gate(0, 0, 0, 0.1), gate(1, 1, 1, 0.1), gate(0.1, 0, 1, 0.1)
    assert decision({"a": good, "b": open_, "c": bad})[0] == NO_GO
    assert decision({"a": good, "b": open_})[0] == CANNOT_TELL
    verdict, table = decision({"a": good})
    assert verdict == GO and table.loc["a", "verdict"] == GO
    with pytest.raises(ValueError, match="at least one"):
        decision({})


def test_a_single_document_cannot_tell():
    assert gate(0.05, -np.inf, np.inf, 0.1)["verdict"] == CANNOT_TELL
