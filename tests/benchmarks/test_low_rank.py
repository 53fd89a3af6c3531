"""The low-rank baseline is the best of its kind: exact at full rank, losing just the discarded energy."""

import pytest
import torch
from conftest import logits
from low_rank import allocated_ranks, low_rank_model, uniform_ranks, whitened_svd

from dha_utils.measure.moments import collect_moments, with_bias


def test_full_rank_changes_nothing(model, blocks):
    same = low_rank_model(model, whitened_svd(model, collect_moments(model, blocks)), uniform_ranks(model, 1.0))
    assert (logits(same, blocks) - logits(model, blocks)).abs().max() < 1e-4


def test_what_is_lost_is_the_discarded_energy(model, blocks):
    moments = collect_moments(model, blocks)
    layers, ranks = whitened_svd(model, moments), [9, 9, 9]
    cut = low_rank_model(model, layers, ranks)
    for before, after, (_, s), its_moments in zip(model.model.layers, cut.model.layers, layers, moments):
        old, new = (torch.cat([with_bias(m.self_attn.k_proj), with_bias(m.self_attn.v_proj)]) for m in (before, after))
        error = old - new
        assert torch.linalg.matrix_rank(with_bias(after.self_attn.v_proj)) <= 9
        assert (error @ its_moments.plain @ error.T).trace().item() == pytest.approx(s[9:].square().sum().item(), rel=1e-3)


def test_allocated_ranks_cost_as_much_as_uniform_ones(model, blocks):
    layers, uniform = whitened_svd(model, collect_moments(model, blocks)), uniform_ranks(model, 0.5)
    allocated = allocated_ranks(layers, uniform)
    assert sum(allocated) == sum(uniform)

    def kept(ranks):
        return sum((s[:rank].square().sum() / s.square().sum()).item() for (_, s), rank in zip(layers, ranks))

    assert kept(allocated) >= kept(uniform)
