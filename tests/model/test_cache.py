"""The static cache: unequal numbers of key and value heads, and a decode step that compiles to one graph."""

import pytest
import torch
from test_dha import dha
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, QuantizedCache, StaticCache
from transformers.masking_utils import flash_attention_mask

from dha_utils.model.cache import DhaStaticCache
from dha_utils.sources.precision import cast_weights


def test_a_static_cache_made_for_other_models_is_refused_in_a_sentence(blocks):
    model = dha()
    with pytest.raises(ValueError, match="StaticCache cannot hold 1 key heads beside 4 value heads"):
        model(blocks[:1, :5], past_key_values=StaticCache(model.config, 9))


@pytest.mark.parametrize("padding", [0, 3])
def test_a_static_cache_holds_unequal_counts(padding, blocks):
    model, mask = dha(), (torch.arange(6) >= torch.tensor([[padding], [0]])).long()
    dynamic, static = (
        model.generate(blocks[:2, :6], attention_mask=mask, max_new_tokens=12, do_sample=False, **how)
        for how in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(dynamic, static)
    cache = DhaStaticCache(model.config, 20)
    model(blocks[:2, :6], past_key_values=cache)
    counts = [(layer.keys.shape[1], layer.values.shape[1]) for layer in cache.layers]
    assert counts == [tuple(pair) for pair in model.config.head_counts()]


def test_a_decode_step_is_one_graph(blocks):
    """torch.compile refuses graph breaks; the compiled step gives the logits of the plain one."""
    model = dha()
    with torch.no_grad():
        plain, compiled = (model(blocks[:2, :6], past_key_values=DhaStaticCache(model.config, 12)) for _ in range(2))
        step = torch.compile(model, backend="eager", fullgraph=True)
        for t in range(6, 9):
            given = {"position_ids": torch.full((2, 1), t)}
            plain = model(blocks[:2, t : t + 1], past_key_values=plain.past_key_values, **given)
            compiled = step(blocks[:2, t : t + 1], past_key_values=compiled.past_key_values, **given)
            assert torch.allclose(plain.logits, compiled.logits, atol=1e-6)


def padding_only(module, query, key, value, mask, scaling=None, **kwargs):
    """What FlashAttention makes of its mask: keys are cut to it, padded ones left out; causal from the last token back."""
    output = torch.zeros_like(query.transpose(1, 2))
    for row in range(len(query)):
        seen = torch.ones(key.shape[2], dtype=torch.bool) if mask is None else mask[row].bool()
        keys, values = (states[row, :, : len(seen)][:, seen] for states in (key, value))
        new = seen[-query.shape[2] :]
        scores = query[row][:, new] @ keys.mT * scaling
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
        output[row, new] = (scores.masked_fill(~causal, -1e30).softmax(-1) @ values).transpose(0, 1)
    return output, None


@pytest.mark.parametrize("static", ["dynamic", "static"])
@pytest.mark.parametrize("prompt, padding, chunk", [(1, 0, None), (8, 0, None), (8, 3, None), (8, 3, 3), (70, 3, None)])
def test_masks_of_flash_attention_are_understood(static, prompt, padding, chunk, blocks, monkeypatch):
    """It has two dimensions, and over a static cache it is shorter than the cache."""
    AttentionInterface.register("padding_only", padding_only)
    AttentionMaskInterface.register("padding_only", flash_attention_mask)
    model, tokens = dha(), blocks.flatten()[: 2 * prompt].view(2, prompt)
    how = {"attention_mask": (torch.arange(prompt) >= torch.tensor([[padding], [0]])).long(), "max_new_tokens": 8}
    how["do_sample"] = False
    expected = model.generate(tokens, **how)
    model.set_attn_implementation("padding_only")
    monkeypatch.setattr("transformers.generation.utils.is_flash_attention_requested", lambda *_, **__: True)
    found = model.generate(tokens, cache_implementation=static, prefill_chunk_size=chunk, **how)
    assert torch.equal(found, expected)


def test_a_mask_of_whole_numbers_is_one_of_booleans(blocks):
    model, mask = dha(), torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    found = []
    for kind in (torch.bool, torch.long):
        cache = DynamicCache()
        model(blocks[:1, :6], past_key_values=cache)
        found.append(model(blocks[:1, 6:9], attention_mask=mask[:, :, 6:].to(kind), past_key_values=cache).logits)
    assert torch.equal(*found)


@torch.no_grad()
def test_a_quantised_cache_holds_unequal_counts(blocks):
    """Keys and values in eight bits: the logits move a little, and the bytes are a quarter of float32's."""
    model, logits = dha(), []
    for cache in (DynamicCache(), QuantizedCache("fp8", model.config)):
        model(blocks[:2, :9], past_key_values=cache)
        logits += [model(blocks[:2, 9:10], past_key_values=cache).logits]
    moved = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < moved < 0.1
    for layer, counts in zip(cache.layers, model.config.head_counts()):
        for states, count in zip((layer._quantized_keys, layer._quantized_values), counts):
            assert states[0].element_size() == 1 and states[0].shape[1] == count


@torch.no_grad()
@pytest.mark.parametrize(
    "dtype, padding, cache",
    [(torch.float32, 0, None), (torch.float32, 7, "static"), (torch.bfloat16, 7, None), (torch.float16, 0, "static")],
)
def test_512_greedy_tokens_are_those_of_one_full_forward(dtype, padding, cache, blocks):
    """Each decoded token is the likeliest one when the whole text is read at once; in 16 bits, but for near ties."""
    model = cast_weights(dha(max_position_embeddings=1024), dtype)
    model.generation_config.eos_token_id = None
    mask = (torch.arange(8) >= torch.tensor([[padding], [0]])).long()
    how = {"attention_mask": mask, "max_new_tokens": 512, "do_sample": False, "cache_implementation": cache}
    text = model.generate(blocks[:2, :8], **how)
    mask = torch.cat([mask, torch.ones(2, 512, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(text, attention_mask=mask, position_ids=positions).logits[:, 7:-1].float()
    lacking = logits.max(-1).values - logits.gather(-1, text[:, 8:, None])[..., 0]
    assert text.shape[1] == 520 and lacking.max() <= 16 * torch.finfo(dtype).eps * logits.std()
