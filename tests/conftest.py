"""Tiny random LLaMA models: every shape that the oracles of the design ask for."""

from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from dha_utils import HeadPlan, fuse

# pytest --hypothesis-profile=thorough for more, and other, examples than always the same
settings.register_profile("same", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("same")

SHAPES = {
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "tie_word_embeddings": True},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12},
    "bias": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
}
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test needs the hub, which would be asked again and again for what is not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def tiny_llama(seed=0, **shape):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
        | {"max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 96, "pad_token_id": 96}
        | {"initializer_range": 0.15}  # heads that differ, attention that is not flat
        | shape
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=SHAPES)
def model(request):
    return tiny_llama(**SHAPES[request.param])


@pytest.fixture
def mha():
    return tiny_llama(**SHAPES["mha"])


@pytest.fixture
def gqa():
    return tiny_llama(**SHAPES["gqa"])


@pytest.fixture
def blocks():
    return torch.randint(0, 96, (6, 32), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def fused(mha, blocks):
    return fuse(mha, HeadPlan.uniform(mha.config, 2, 1), blocks)


@torch.no_grad()
def logits(model, blocks):
    return model(blocks).logits


@contextmanager
def killed_at_step(model, count):
    """The block under `with` must die, as by a kill, in the count-th training step of `model` (or of a copy of it)."""

    class Killed(Exception):
        pass

    calls = []

    def kill(layer, _):
        if layer.training:  # evaluations do not count
            calls.append(1)
            if len(calls) == count:
                raise Killed

    hook = model.model.layers[0].register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        yield
    hook.remove()


def half_plan(model):
    return HeadPlan.uniform(model.config, 2, 1)


def changed(before, after):
    """The names of the weights that differ between two models of one shape."""
    pairs = zip(before.named_parameters(), after.named_parameters())
    return {name for (name, old), (_, new) in pairs if not torch.equal(old, new)}
