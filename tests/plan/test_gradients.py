"""The slopes of the predictions: those of autograd through the whole model, and what they foretell of a small change."""

import pytest
import torch
from conftest import logits, tiny_llama

from dha_utils.measure.stream import after_attention, first_stream, read_out
from dha_utils.plan.gradients import layer_slopes, residual_gradients, score_slope


def test_a_walk_backwards_is_autograd_through_the_model(model, blocks):
    stream, rope = first_stream(model, blocks[:1])
    states, seen = [stream.requires_grad_(True)], []
    for layer in model.model.layers:
        seen.append(after_attention(layer, states[-1], rope))
        states.append(seen[-1] + layer.mlp(layer.post_attention_layernorm(seen[-1])))
    scores = model.lm_head(model.model.norm(states[-1])).log_softmax(-1)[0]
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(scores.gather(-1, drawn).sum(), seen)
    for got, slope in zip(residual_gradients(model, blocks[:1]), expected):
        assert torch.allclose(got, slope, atol=1e-5)


def test_mean_square_slopes_are_twice_the_divergence_of_a_small_change(mha, blocks):
    """Fisher information, over many draws of the tokens."""
    torch.manual_seed(0)
    stream, rope = first_stream(mha, blocks[:1])
    layer, change = mha.model.layers[-1], 0.02 * torch.randn(1, 1, 48)
    middle = after_attention(layer, stream, rope).detach()

    def scores(states):
        with torch.no_grad():
            behind = states + layer.mlp(layer.post_attention_layernorm(states))
            return mha.lm_head(mha.model.norm(behind)).log_softmax(-1), behind

    before, behind = scores(middle)
    divergence = (before.exp() * (before - scores(middle + change)[0])).sum(-1).mean().item()
    random, squares = torch.Generator().manual_seed(0), []
    for _ in range(200):
        slope = score_slope(read_out(mha), behind, random)
        squares.append((layer_slopes(layer, stream, slope, rope)[1] * change).sum(-1).square().mean())
    assert torch.stack(squares).mean().item() / 2 == pytest.approx(divergence, rel=0.1)


def test_the_model_is_left_as_it_was(blocks):
    model = tiny_llama(num_attention_heads=4)
    before = logits(model, blocks)
    residual_gradients(model, blocks)
    assert torch.equal(logits(model, blocks), before) and all(p.grad is None for p in model.parameters())
