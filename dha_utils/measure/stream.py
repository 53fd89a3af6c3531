"""A model one layer at a time: the residual stream of some blocks is carried from layer to layer.

Whatever looks at one layer needs that layer and the stream that enters it. So a model in memory and a folder of shards
(`sources/shards.py`), of which one layer is read at a time, are the same walk. Layers compute in float32 whatever the
checkpoint's dtype; between layers the stream rests on the CPU.
"""

import copy
from contextlib import contextmanager

import torch


@contextmanager
def attention_backend(name, *models):
    """The `models` compute their attention by transformers' backend `name`, without dropout, in a `with` block."""
    before = [(model.config._attn_implementation, model.training) for model in models]
    for model in models:
        model.eval().set_attn_implementation(name)
    try:
        yield
    finally:
        for model, (own, training) in zip(models, before):
            model.train(training).set_attn_implementation(own)


def each_layer(model, order=None):
    """Yields (index, decoder layer in float32 on the model's device), one at a time, all or those of `order`."""
    for index in range(len(model.model.layers)) if order is None else order:
        if hasattr(model, "shards"):
            yield index, model.shards.layer(model, index)
        else:
            yield index, in_float32(model.model.layers[index])


def in_float32(module):
    """The module itself, or a copy without dropout if it is of another dtype; the model's config stays that of both."""
    if all(weight.dtype == torch.float32 for weight in module.parameters()):
        return module
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}  # not copied
    return copy.deepcopy(module, configs).float().eval()


@torch.no_grad()
def first_stream(model, blocks):
    """(stream [blocks, length, hidden] that enters the first layer, RoPE's cos and sin [1, length, d])."""
    device = model.model.embed_tokens.weight.device
    stream = torch.cat([model.model.embed_tokens(block[None].to(device)).float().cpu() for block in blocks])
    positions = torch.arange(blocks.shape[1], device=device)[None]
    return stream, model.model.rotary_emb(stream[:1].to(device), positions)


def after_attention(layer, hidden_states, rope_cos_sin):
    """The residual stream behind the attention of a decoder layer: [batch, length, hidden]."""
    normed = layer.input_layernorm(hidden_states)
    return hidden_states + layer.self_attn(normed, position_embeddings=rope_cos_sin, attention_mask=None)[0]


def after_mlp(layer, hidden_states, rope_cos_sin=None):
    """The residual stream behind a decoder layer from the one behind its attention: [batch, length, hidden].

    `rope_cos_sin` is not used: with it, `each_block` takes this function like the other two.
    """
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))


def after_layer(layer, hidden_states, rope_cos_sin):
    """The residual stream behind a decoder layer: [batch, length, hidden]."""
    return after_mlp(layer, after_attention(layer, hidden_states, rope_cos_sin))


@torch.no_grad()
def each_block(output, layer, stream, rope_cos_sin):
    """`output` (`after_attention`, `after_mlp`, `after_layer`) of every block of `stream` [blocks, length, hidden]."""
    device = rope_cos_sin[0].device
    return torch.cat([output(layer, block[None].to(device), rope_cos_sin).to(stream.device) for block in stream])


def causal_mask(length, device=None):
    """[1, 1, length, length], to be added to scores: eager attention without a mask is not causal."""
    lowest = torch.finfo(torch.float32).min
    return torch.full((length, length), lowest, device=device).triu(1)[None, None]


@torch.no_grad()
def next_token_scores(model, stream, dtype=torch.float32):
    """Yields, block by block of the `stream` behind the last layer, log-probabilities [length, vocabulary].

    Computed in float32; `dtype`: the one that the weights of the last norm and the head are rounded to before.
    """
    head = read_out(model, dtype)
    for block in stream:
        yield head(block.to(model.device)).log_softmax(-1)


def read_out(model, dtype=torch.float32):
    """The last norm and the head of a model as one function, in float32, their weights rounded to `dtype` before."""
    norm, head = model.model.norm, model.lm_head
    if dtype == torch.float32:
        norm, head = in_float32(norm), in_float32(head)
    else:
        norm, head = (copy.deepcopy(part).to(dtype).float() for part in (norm, head))
    return lambda states: head(norm(states))
