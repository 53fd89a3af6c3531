"""The low-rank baseline is the best of its kind: exact at full rank, losing just the discarded energy."""

import pytest
import torch
from conftest import logits
from low_rank import allocated_ranks, low_rank_model, uniform_ranks, whitened_svd
from transformers import DynamicCache

from dha_utils.fuse.refit import refit
from dha_utils.measure.moments import collect_moments, with_bias


def test_full_rank_changes_nothing(model, blocks):
    same = low_rank_model(model, whitened_svd(model, collect_moments(model, blocks)), uniform_ranks(model, 1.0))
    assert (logits(same, blocks) - logits(model, blocks)).abs().max() < 1e-4


def test_what_is_lost_is_the_discarded_energy(model, blocks):
    moments = collect_moments(model, blocks)
    layers, ranks = whitened_svd(model, moments), [9, 9, 9]
    cut = low_rank_model(model, layers, ranks)
    for before, after, (_, s), its_moments in zip(model.model.layers, cut.model.layers, layers, moments):
        old = torch.cat([with_bias(before.self_attn.k_proj), with_bias(before.self_attn.v_proj)])
        up = torch.cat([after.self_attn.key_up.weight, after.self_attn.value_up.weight])
        error = old - up @ with_bias(after.self_attn.down)
        assert after.self_attn.down.out_features == 9
        assert (error @ its_moments.plain @ error.T).trace().item() == pytest.approx(s[9:].square().sum().item(), rel=1e-3)


def test_allocated_ranks_cost_as_much_as_uniform_ones(model, blocks):
    layers, uniform = whitened_svd(model, collect_moments(model, blocks)), uniform_ranks(model, 0.5)
    allocated = allocated_ranks(layers, uniform)
    assert sum(allocated) == sum(uniform)

    def kept(ranks):
        return sum((s[:rank].square().sum() / s.square().sum()).item() for (_, s), rank in zip(layers, ranks))

    assert kept(allocated) >= kept(uniform)


def test_decoding_over_the_small_cache_is_the_full_forward(model, blocks):
    """What is cached is `rank` numbers a token, and the logits of each new token are those of the whole text."""
    cut = low_rank_model(model, whitened_svd(model, collect_moments(model, blocks)), [9, 9, 9])
    whole, cache = logits(cut, blocks[:2, :12]), DynamicCache(config=cut.config)
    with torch.no_grad():
        cut(blocks[:2, :6], past_key_values=cache)
        for t in range(6, 12):
            step = cut(blocks[:2, t : t + 1], past_key_values=cache).logits[:, 0]
            assert torch.allclose(step, whole[:, t], atol=1e-4)
    assert {layer.keys.numel() + layer.values.numel() for layer in cache.layers} == {2 * 12 * 9}


def test_a_refit_brings_it_closer(model, blocks):
    cut = low_rank_model(model, whitened_svd(model, collect_moments(model, blocks)), [9, 9, 9])
    errors = refit(cut, model, blocks)[1].loc[0]
    assert errors.loc["layer", "after"] < errors.loc["attention", "before"]
