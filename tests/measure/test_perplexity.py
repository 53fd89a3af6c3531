"""Perplexity and its interval."""

import pytest
import torch
from study_claims import (
    verdict,
)

from dha_utils.measure.perplexity import interval, perplexity, scored_tokens, token_losses


def test_perplexity_counts_its_tokens(mha, blocks):
    with torch.no_grad():
        expected = torch.stack([mha(block[None], labels=block[None]).loss for block in blocks]).mean().exp().item()
    assert perplexity(mha, blocks) == pytest.approx(expected, rel=1e-5)
    assert scored_tokens(blocks) == token_losses(mha, blocks).numel() == 6 * 31


def test_interval_is_students():
    mean, low, high = interval([1, 2, 3])
    assert (
        mean == 2 and high - mean == pytest.approx(4.3027 / 3**0.5, rel=1e-4) and mean - low == pytest.approx(high - mean)
    )
    assert interval([2, 2, 2]) == (2, 2, 2)
    assert verdict(1, 2) == "holds" and verdict(-2, -1) == "does not hold" and verdict(-1, 1) == "cannot be told"
