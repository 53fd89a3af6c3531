"""Normalised queries and keys (Qwen3): the gauge behind the norms does what its equation says, and fusion uses it."""

import pytest
import torch
from conftest import logits
from transformers import Qwen3Config, Qwen3ForCausalLM

from dha_utils import DhaConfig, HeadPlan, fuse
from dha_utils.fuse.normed import plane_energy
from dha_utils.measure.energies import as_planes, head_energies, normed_rows
from dha_utils.model.dha import DhaAttention
from dha_utils.sources.precision import as_float64

SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 12, "initializer_range": 0.15, "max_position_embeddings": 128}


@pytest.fixture
def qwen3():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@torch.no_grad()
def test_a_gauge_turns_the_planes_that_a_query_carries():
    torch.manual_seed(0)
    planes = [[3, 1, 1, 0, 5, 2], [0, 0, 4, 5, 2, 1]]
    config = DhaConfig(**SHAPE, query_key_norm=True, key_head_map=[[0, 1, 1, 0]] * 2, key_frequencies=[planes] * 2)
    attention = DhaAttention(config, 0)
    for weight in (attention.query_gauge, attention.q_norm.weight):
        torch.nn.init.normal_(weight)
    states = torch.randn(1, 5, 48)
    query = attention.q_proj(states).view(1, 5, 4, 12)
    normed = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
    got = attention._gauge(attention.q_norm(query))
    for head, key_head in enumerate([0, 1, 1, 0]):
        factor = torch.complex(attention.query_gauge[head, :6], attention.query_gauge[head, 6:])
        for place, plane in enumerate(planes[key_head]):
            carried = torch.complex(normed[..., head, plane], normed[..., head, plane + 6]) * factor[place]
            assert torch.allclose(torch.complex(got[..., head, place], got[..., head, place + 6]), carried, atol=1e-5)


def test_rows_behind_a_norm_have_its_mean_square(qwen3, blocks):
    attention, plain = qwen3.model.layers[0].self_attn, torch.eye(48, dtype=torch.float64)
    rows = normed_rows(attention.k_proj, attention.k_norm, plain).unflatten(0, (-1, 12))
    unweighted = rows / as_float64(attention.k_norm.weight)[:, None]
    assert torch.allclose(unweighted.square().sum(-1).mean(-1), torch.ones(2, dtype=torch.float64), atol=1e-4)
    energy = as_planes(rows.flatten(0, 1), 12).abs().square().sum(-1)
    assert torch.allclose(plane_energy(rows, plain), energy)


def test_fusion_is_nearer_to_the_source_than_averaging(qwen3, blocks):
    plan, source = HeadPlan.uniform(qwen3.config, 1, 2), logits(qwen3, blocks)
    free, standard, pooled = (
        (logits(fuse(qwen3, plan, blocks, **way), blocks) - source).square().mean()
        for way in ({}, {"free_frequencies": False}, {"method": "mean"})
    )
    assert free < 0.8 * pooled and standard < 0.8 * pooled
    assert all(energies.plain is not None for energies in head_energies(qwen3, blocks))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_decoding_with_a_cache_is_the_whole_pass(qwen3, blocks, backend):
    fused = fuse(qwen3, HeadPlan.uniform(qwen3.config, 1, 2), blocks)
    fused.set_attn_implementation(backend)
    cached = fused.generate(blocks[:2, :9], max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, fused.generate(blocks[:2, :9], max_new_tokens=6, do_sample=False, use_cache=False))
