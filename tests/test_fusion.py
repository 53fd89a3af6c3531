"""Oracles of fusion: exact identities first (design, section 6)."""

import pytest
import torch
from conftest import SHAPES, logits, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dha_utils import HeadPlan, cache_bytes, fuse, head_similarity, plan_heads, plant_redundancy
from dha_utils.freedoms import apply_freedoms
from dha_utils.fusion import spectral_layers
from dha_utils.sensitivity import group_heads
from dha_utils.spectral import as_planes, from_planes


@pytest.mark.parametrize("method", ["mean", "spectral"])
def test_every_head_kept_is_the_source(model, blocks, method):
    heads = model.config.num_key_value_heads
    fused = fuse(model, HeadPlan.uniform(model.config, heads, heads), blocks, method)
    assert torch.allclose(logits(fused, blocks), logits(model, blocks), atol=1e-5)


def test_uniform_mean_pooling_is_transformers_gqa(blocks):
    source = tiny_llama(num_attention_heads=4, num_key_value_heads=4, head_dim=12)
    config = LlamaConfig(**source.config.to_dict() | {"num_key_value_heads": 2})
    weights = source.state_dict()
    for name, weight in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            weights[name] = weight.view(2, 2, 12, -1).mean(1).flatten(0, 1)
    gqa = LlamaForCausalLM(config).eval()
    gqa.load_state_dict(weights)
    fused = fuse(source, HeadPlan.uniform(source.config, 2, 2), method="mean")
    assert torch.allclose(logits(fused, blocks), logits(gqa, blocks), atol=1e-5)
    assert cache_bytes(fused, 10) == cache_bytes(gqa, 10)


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


def test_spectral_beats_mean_pooling_on_its_own_metric(mha, blocks):
    """The closed form is the optimum of its metric: no other shared head, the mean among them, can cost less."""
    for layer in spectral_layers(mha, blocks):
        for group in ((0, 1), (1, 3), (0, 1, 2, 3)):
            g, heads = len(group), list(group)
            lost, _ = layer.value_cost(group)
            rows = layer._rows(group)
            metric = torch.block_diag(*layer.value_metric[heads])
            residual = metric @ (torch.eye(g * 12) - torch.eye(12).repeat(g, g) / g).double()  # v_h − v̄
            assert 0 <= lost <= float((residual @ layer.value_energy[rows][:, rows] @ residual.T).trace()) * (1 + 1e-5)
            lost, _ = layer.key_cost(group)
            weight = layer.query_weight[heads].T.to(layer.key_energy.dtype)
            keys = layer.key_energy[:, heads][:, :, heads] / (weight[:, :, None] * weight[:, None])  # E[conj(k_h) k_h']
            residual = (torch.eye(g) - 1 / g).to(keys.dtype)  # k_h − k̄
            left = (residual @ keys @ residual).diagonal(dim1=1, dim2=2).real
            assert 0 <= lost <= float((left * weight.real**2).sum()) * (1 + 1e-5)


def test_identical_heads_cost_nothing(mha, blocks):
    for layer in mha.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data[12:24] = projection.weight.data[:12]
    for layer in spectral_layers(mha, blocks):
        for lost, total in (layer.key_cost((0, 1)), layer.value_cost((0, 1))):
            assert abs(lost) <= 1e-5 * total


def test_planes_round_trip():
    rows = torch.randn(3 * 8, 5)
    assert torch.equal(from_planes(as_planes(rows, 8)), rows)
    assert as_planes(rows, 8)[1, 2, 3] == torch.complex(rows[8 + 2, 3], rows[8 + 2 + 4, 3])


def test_gauge_is_balanced(mha, blocks):
    fused = fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)
    attention = fused.model.layers[1].self_attn
    rows = attention.v_proj.weight.norm(dim=1)
    columns = attention.o_proj.weight.unflatten(1, (4, 12)).square().sum(0).mean(0).sqrt()
    assert torch.allclose(rows, columns, rtol=1e-3)


def test_saved_and_loaded_is_the_same(mha, blocks, tmp_path):
    fused = fuse(mha, plan_heads(mha, blocks, 0.5), blocks)
    assert fused.config.key_frequencies is not None
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(fused)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    assert torch.equal(logits(loaded, blocks), logits(fused, blocks))
    prompt = blocks[:2, :8]
    assert torch.equal(
        loaded.generate(prompt, max_new_tokens=12, do_sample=False),
        fused.generate(prompt, max_new_tokens=12, do_sample=False),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_cache_holds_the_few_heads(shape, blocks):
    model = tiny_llama(**SHAPES[shape])
    fused = fuse(model, HeadPlan.uniform(model.config, 1, 2), method="mean")
    heads, d = sum(map(sum, fused.config.head_counts())), model.config.head_dim
    assert cache_bytes(fused, length=20, batch_size=3) == heads * d * 20 * 3 * 4
    assert cache_bytes(fused, 20) / cache_bytes(model, 20) == pytest.approx(fused.config.budget)


def test_bad_requests_are_refused(mha, blocks):
    with pytest.raises(ValueError, match="no fusion method 'median'"):
        fuse(mha, HeadPlan.uniform(mha.config, 2, 2), blocks, "median")
    with pytest.raises(ValueError, match="calibration"):
        fuse(mha, HeadPlan.uniform(mha.config, 2, 2))
    with pytest.raises(ValueError, match="the plan is for 3 layers of 3 key-value heads"):
        fuse(mha, HeadPlan([[[0, 1, 2]]] * 3, [[[0, 1, 2]]] * 3), blocks)


def test_partition_costs_fall_with_heads(mha, blocks):
    for layer in group_heads(mha, blocks):
        for kind in layer:
            costs = [cost for cost, _ in kind]
            assert costs == sorted(costs, reverse=True) and costs[-1] < 1e-5


def test_a_dha_model_is_no_source(mha, blocks):
    plan = HeadPlan.uniform(mha.config, 2, 2)
    fused = fuse(mha, plan, method="mean")
    for convert in (
        lambda: head_similarity(fused),
        lambda: plan_heads(fused, blocks, budget=0.5),
        lambda: fuse(fused, plan, method="mean"),
    ):
        with pytest.raises(ValueError, match="a 'dha' model already: give the LLaMA checkpoint"):
            convert()
