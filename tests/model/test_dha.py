"""The DHA model as transformers' users meet it: cache, padding, static caches, training."""

import pytest
import torch
from conftest import logits
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dha_utils import DhaConfig, DhaForCausalLM
from dha_utils.measure.stream import causal_mask
from dha_utils.model import groups
from dha_utils.model.cache import DhaStaticCache


@pytest.fixture(autouse=True, params=[groups.MANY, 0], ids=["one product", "a product a group"])
def products(request, monkeypatch):
    """Both ways to multiply queries and keys, whatever the length."""
    monkeypatch.setattr(groups, "MANY", request.param)


def dha(**changes):
    torch.manual_seed(1)
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 96,
        "pad_token_id": 96,
        "key_head_map": [[0, 0, 1, 1, 2, 0], [0] * 6],
        "value_head_map": [[0, 1, 1, 0, 0, 2], [0, 1, 2, 3, 0, 0]],
        "key_frequencies": [[[0, 1, 2, 3, 3, 3, 2, 1]] * 3, [list(range(8))]],
    }
    return DhaForCausalLM(DhaConfig(**settings | changes)).eval()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_cached_decoding_is_the_full_forward(backend, padding, bias, blocks):
    model = dha(attention_bias=bias)
    model.set_attn_implementation(backend)
    tokens = blocks[:2, :14]
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0  # left padding, as for generation
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, position_ids=positions).logits
        cache = model(
            tokens[:, :9], attention_mask=mask[:, :9], position_ids=positions[:, :9], use_cache=True
        ).past_key_values
        for t in range(9, 14):
            step = model(
                tokens[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, t : t + 1],
                past_key_values=cache,
            ).logits
            assert torch.allclose(step[:, 0], full[:, t], atol=1e-5)
    for layer, (keys, values) in zip(cache.layers, model.config.head_counts()):
        assert layer.keys.shape[1] == keys and layer.values.shape[1] == values


def test_padded_batch_generates_as_each_alone(blocks):
    model = dha()
    prompt = blocks[:1, :6]
    padded = torch.cat([torch.full((1, 4), 96), prompt], 1)
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    mask = (torch.arange(10) >= 4).long()[None]
    together = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    assert torch.equal(together[:, 4:], alone)


def test_own_heads_and_standard_planes_are_llama(mha, blocks):
    settings = {k: v for k, v in mha.config.to_dict().items() if k not in ("model_type", "architectures")}
    model = DhaForCausalLM(DhaConfig(**settings)).eval()
    model.load_state_dict(mha.state_dict())
    assert torch.allclose(logits(model, blocks), logits(mha, blocks), atol=1e-6)


def test_every_key_plane_of_one_frequency_is_its_own_rotation(blocks):
    """A head that carries plane 3 eight times turns all of them by θ_3."""
    model = dha(key_frequencies=[[[3] * 8] * 3, [[3] * 8]])
    attention = model.model.layers[0].self_attn
    key = torch.randn(1, 3, 5, 16)
    cos, sin = model.model.rotary_emb(key, torch.arange(5)[None])
    _, turned = attention._rotate(torch.randn(1, 6, 5, 16), key, cos, sin)
    angle = torch.arange(5) * model.model.rotary_emb.inv_freq[3]
    expected = torch.complex(key[..., :8], key[..., 8:]) * torch.polar(torch.ones(5), angle)[:, None]
    assert torch.allclose(torch.complex(turned[..., :8], turned[..., 8:]), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunks", [(9, 3, 2), (5, 1, 8), (1, 12, 1)])
def test_a_conversation_goes_on_in_pieces_without_copying_a_head(backend, padding, static, chunks, blocks, monkeypatch):
    """Several new tokens over a cache, as chunked prefill and assisted generation have them."""
    model, tokens = dha(), blocks[:2, :14]
    model.set_attn_implementation(backend)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, at, pieces = DhaStaticCache(model.config, 17) if static else DynamicCache(), 0, []
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, position_ids=positions).logits
        for size in chunks:
            if at:  # every backend would be handed as many heads as there are queries
                monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", None)
            given = {"attention_mask": mask[:, : at + size], "position_ids": positions[:, at : at + size]}
            pieces.append(model(tokens[:, at : at + size], past_key_values=cache, **given).logits)
            at += size
    assert torch.allclose(torch.cat(pieces, 1)[mask.bool()], full[mask.bool()], atol=1e-5)


def test_a_few_new_tokens_without_a_mask_see_what_came_before_them():
    attention = dha().model.layers[0].self_attn
    states, cache = torch.randn(2, 9, 48), DynamicCache()
    turns = dha().model.rotary_emb(states, torch.arange(9)[None])
    whole = attention(states, turns, causal_mask(9))[0]
    pieces = [
        attention(states[:, a:b], [t[:, a:b] for t in turns], causal_mask(4) if not a else None, past_key_values=cache)[0]
        for a, b in ((0, 4), (4, 7), (7, 9))
    ]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(blocks):
    gradients = []
    for checkpointing in (False, True):
        model = dha().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(blocks, labels=blocks).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_maps_with_gaps_are_refused():
    with pytest.raises(ValueError, match=r"key_head_map\[1\] must give each of the 6 query heads"):
        dha(key_head_map=[[0] * 6, [0, 0, 2, 2, 2, 2]])
    with pytest.raises(ValueError, match="value_head_map has 1 layers, the model 2"):
        dha(value_head_map=[[0] * 6])
