"""Oracles of fusion: exact identities first (design, section 6)."""

import pytest
import torch
from conftest import SHAPES, logits, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dha_utils import HeadPlan, cache_bytes, fuse, head_similarity, plan_heads, to_llama
from dha_utils.paper.linear import with_omega


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
            with pytest.raises(ValueError, match=f"made of {made_of}: give a plain LlamaForCausalLM .*, adapters merged"):
                convert()
    fuse(adapted.merge_and_unload(), plan, blocks)


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
