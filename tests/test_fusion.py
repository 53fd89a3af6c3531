"""Oracles of fusion: exact identities first (design, section 6)."""

import pytest
import torch
from conftest import SHAPES, logits, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dha_utils import HeadPlan, cache_bytes, fuse, head_similarity, plan_heads, plant_redundancy, to_llama
from dha_utils.freedoms import apply_freedoms
from dha_utils.fusion import spectral_layers
from dha_utils.linear import with_omega
from dha_utils.sensitivity import group_heads
from dha_utils.spectral import as_planes, from_planes, key_and_query_planes, rope_hiding
from dha_utils.statistics import EVERY


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


@torch.no_grad()
@pytest.mark.parametrize("free", [True, False])
def test_the_energy_that_a_fusion_loses_is_what_it_was_said_to_cost(mha, blocks, free):
    """Measured token by token on the calibration text, from the fused weights, for keys and for values."""
    layers = spectral_layers(mha, blocks, free)
    mha.set_attn_implementation("eager")
    output = mha(blocks, output_attentions=True, output_hidden_states=True)
    hidden = rope_hiding(mha.model.rotary_emb)
    for index, (layer, spectral) in enumerate(zip(mha.model.layers, layers)):
        attention, group = layer.self_attn, [0, 2, 3]
        x = layer.input_layernorm(output.hidden_states[index]).double()
        weights = output.attentions[index].double()[:, :, (x.shape[1] - 1) % EVERY :: EVERY]
        averaged = weights @ x[:, None]  # [blocks, heads, queries, hidden]: what the heads really average

        key, query, planes = spectral.fuse_keys(group)
        shared = as_planes(key, 12)[0]
        own_keys, own_queries = key_and_query_planes(attention)
        ratio = as_planes(query, 12)[..., 0] / own_queries[group, 0][:, planes, 0]  # [g, d/2]: how queries were turned
        lost = 0.0
        for plane in range(6):
            for place, head in enumerate(group):
                left = own_keys[head, plane] - (ratio[place].conj()[:, None] * shared)[planes == plane].sum(0)
                error, mean = (states.to(left.dtype) @ left for states in (x, averaged))
                seen = (weights * error.abs().square()[:, None, None]).sum(-1).mean()
                covariance = seen - hidden[plane] * mean.abs().square().mean()
                lost += float(spectral.query_weight[head, plane] ** 2 * covariance)
        assert lost == pytest.approx(spectral.key_cost(group)[0], rel=1e-5)

        value, columns = spectral.fuse_values(group)
        before = (
            attention.v_proj.weight.double().unflatten(0, (4, 12)),
            attention.o_proj.weight.double().unflatten(1, (4, 12)),
        )
        lost = 0.0
        for place, head in enumerate(group):
            left = before[1][:, head] @ before[0][head] - columns[:, place * 12 : place * 12 + 12] @ value
            lost += float((averaged @ left.T).square().sum(-1).mean())
        assert lost == pytest.approx(spectral.value_cost(group)[0], rel=1e-5)


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


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_llama_of_a_uniform_plan(shape, blocks, tmp_path):
    source = tiny_llama(**SHAPES[shape])
    heads = source.config.num_key_value_heads
    kept = 2 if heads == 4 else 1
    groups = [[0, 2], [1, 3]] if heads == 4 else [list(range(heads))]  # not neighbours: query heads change places
    values = groups[::-1]  # the same groups, counted otherwise
    for plan in (HeadPlan.uniform(source.config, kept, kept), HeadPlan([groups] * 3, [values] * 3)):
        fused = fuse(source, plan, blocks, free_frequencies=False)
        plain = to_llama(fused)
        assert type(plain) is LlamaForCausalLM and plain.config.num_key_value_heads == kept
        assert torch.allclose(logits(plain, blocks), logits(fused, blocks), atol=1e-5)
        assert cache_bytes(plain, 5) == cache_bytes(fused, 5)
        plain.save_pretrained(tmp_path)
        assert "dha" not in (tmp_path / "config.json").read_text()
        assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path), blocks), logits(plain, blocks))


def test_no_plain_llama_of_other_plans(mha, blocks):
    with pytest.raises(ValueError, match="this is a 'llama' model: to_llama takes a DHA model"):
        to_llama(mha)
    uneven = [[0], [1, 2, 3]]
    for plan, free in (
        (HeadPlan.uniform(mha.config, 2, 1), False),
        (HeadPlan([uneven] * 3, [uneven] * 3), False),
        (HeadPlan([[[0, 1], [2, 3]]] * 3, [[[0, 2], [1, 3]]] * 3), False),
        (HeadPlan.uniform(mha.config, 2, 2), True),
    ):
        with pytest.raises(
            ValueError, match="a plain LLaMA cannot hold this model: it has one number of key and value heads"
        ):
            to_llama(fuse(mha, plan, blocks, free_frequencies=free))


def test_sources_that_are_no_plain_model_are_refused(mha, blocks):
    plan = HeadPlan.uniform(mha.config, 2, 2)
    adapted = get_peft_model(mha, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    elsewhere = get_peft_model(tiny_llama(num_attention_heads=4), LoraConfig(target_modules=["up_proj"])).base_model.model
    sources = (
        (adapted, "Linear, LoraModel, PeftModelForCausalLM"),
        (adapted.base_model.model, "Linear"),
        (elsewhere, "Linear"),
    )
    for source, made_of in sources:
        for convert in (lambda: fuse(source, plan, blocks), lambda: head_similarity(source), lambda: with_omega(source)):  # noqa: B023
            with pytest.raises(ValueError, match=f"made of {made_of}: give a plain LlamaForCausalLM, adapters merged"):
                convert()
    fuse(adapted.merge_and_unload(), plan, blocks)


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
