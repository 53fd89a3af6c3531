"""Every supported family and shape goes the whole way: loaded as a LLaMA, fused, refitted, saved, generating elsewhere."""

import subprocess
import sys

import pytest
import torch
from conftest import logits
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from dha_utils import HeadPlan, convert, fuse, load_checkpoint, plant_redundancy, refit, to_llama

TINY = {"vocab_size": 4096, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": 0}
TINY |= {"bos_token_id": 0, "eos_token_id": 0}


def rope(kind, **settings):
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": scaling | settings}


FAMILIES = {
    "llama": (LlamaConfig, {}),
    "linear": (LlamaConfig, rope("linear")),
    "dynamic": (LlamaConfig, rope("dynamic")),
    "yarn": (LlamaConfig, rope("yarn")),
    "llama3": (LlamaConfig, rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "longrope": (LlamaConfig, rope("longrope", short_factor=[1.0] * 6, long_factor=[2.0] * 6)),
    "bias": (LlamaConfig, {"attention_bias": True}),
    "head_dim": (LlamaConfig, {"head_dim": 16}),
    "one head": (LlamaConfig, {"num_key_value_heads": 1}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mlp bias": (LlamaConfig, {"mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 12}),
    "mistral, wide window": (MistralConfig, {"sliding_window": 128}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "qwen3, wide heads": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_checkpoint("austen-mha")[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_way(name, tokenizer, blocks, saved, tmp_path):
    config, settings = FAMILIES[name]
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config(**TINY | settings)).eval()
    for key, parameter in original.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    original.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source, _ = load_checkpoint(tmp_path)
    assert source.config.model_type == ("qwen3" if config is Qwen3Config else "llama")
    assert torch.equal(logits(source, blocks), logits(original, blocks)), "loaded as a LLaMA it is the same model"

    heads = source.config.num_key_value_heads
    whole, one = (HeadPlan.uniform(source.config, kept, kept) for kept in (heads, 1))
    for method in ("mean", "spectral"):
        assert torch.allclose(logits(fuse(source, whole, blocks, method), blocks), logits(source, blocks), atol=1e-4)
    pooled = fuse(source, one, method="mean")
    if config is not Qwen3Config:
        assert torch.allclose(logits(to_llama(pooled), blocks), logits(pooled, blocks), atol=1e-4)

    planted = plant_redundancy(source)
    assert torch.allclose(logits(planted, blocks), logits(source, blocks), atol=1e-3)
    plan = HeadPlan.uniform(planted.config, heads, heads)
    back = fuse(planted, plan, blocks)
    assert torch.allclose(logits(back, blocks), logits(source, blocks), atol=1e-3)
    assert heads == 4 or (logits(fuse(planted, plan, method="mean"), blocks) - logits(source, blocks)).abs().max() > 0.1

    _, errors = refit(fuse(source, one, blocks), source, blocks)
    assert (errors["after"] <= errors["before"]).all()
    out = convert(tmp_path, blocks, saved / name, plan=one, device="cpu")
    fused, _ = load_checkpoint(out)
    assert fused.config.budget == 1 / heads
    (out / "expected.txt").write_text(str(fused.generate(blocks[:1, :40], max_new_tokens=8, do_sample=False).tolist()))


def test_what_was_saved_generates_the_same_in_a_fresh_process(saved, blocks):
    folders = [saved / name for name in FAMILIES]
    code = (
        "import sys, torch, dha_utils; from transformers import AutoModelForCausalLM\n"
        f"prompt = torch.tensor({blocks[:1, :40].tolist()})\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    print(model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [(folder / "expected.txt").read_text() for folder in folders]


@pytest.mark.parametrize(
    "config, match",
    [
        (MistralConfig(**TINY, sliding_window=64), "attends through a sliding window: supported are LLaMA 1 to 3"),
        (Qwen2Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=1), "through a sliding window"),
        (Qwen2MoeConfig(**TINY, num_experts=2), "is a 'qwen2_moe' model: supported are LLaMA 1 to 3"),
        (Gemma2Config(**TINY, head_dim=12), "is a 'gemma2' model: supported are"),
    ],
)
def test_other_models_are_one_sentence(config, match, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path)
