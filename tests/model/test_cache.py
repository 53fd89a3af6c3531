"""The static cache: unequal numbers of key and value heads, and a decode step that compiles to one graph."""

import pytest
import torch
from test_dha import dha
from transformers import StaticCache

from dha_utils.model.cache import DhaStaticCache


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
