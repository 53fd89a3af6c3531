"""Second moments of the inputs of each attention layer on a calibration text, gathered in one pass."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..sources.families import check_source
from .stream import after_mlp, attention_backend, causal_mask, each_block, each_layer, first_stream

EVERY = 4  # one query in so many tells its attention: its neighbours see nearly the same


@dataclass
class LayerMoments:
    """Moments of the attention input x of one layer, [hidden, hidden]; with attention bias x ends in a constant 1.

    `plain`: E[x xᵀ] over tokens. `mean`: E[x], [hidden].
    `attended`: E[(A_h x)(A_h x)ᵀ] over queries: the averages that the values of head h are made from.
    `seen`: E[x xᵀ] over keys, each weighted by the attention it gets from the same queries. `seen` − `attended` is the
    covariance within a query, all that a softmax can see of the keys. Both are means over the heads. `length`: of the
    blocks, on which some RoPE scalings depend.
    """

    plain: Tensor
    mean: Tensor
    attended: Tensor
    seen: Tensor
    length: int


def collect_moments(model, blocks):
    """One `LayerMoments` per layer of a LLaMA `model`, from `blocks` [blocks, length] of calibration tokens.

    Raises ValueError as `check_source` and `layer_moments` do.
    """
    return [moments for _, moments in each_moments(model, blocks)]


def each_moments(model, blocks):
    """Yields (decoder layer, its `LayerMoments`), one layer at a time; as `collect_moments` otherwise."""
    check_source(model)
    stream, rope_cos_sin = first_stream(model, blocks)
    with attention_backend("eager", model):  # the only one that hands out attention weights
        for _, layer in tqdm(each_layer(model), "moments", len(model.model.layers), leave=False):
            moments, behind = layer_moments(layer, stream, rope_cos_sin)
            stream = each_block(after_mlp, layer, behind, rope_cos_sin)
            yield layer, moments


@torch.no_grad()
def layer_moments(layer, stream, rope_cos_sin):
    """(`LayerMoments` of one layer under eager attention, the stream [blocks, length, hidden] behind that attention).

    Raises ValueError if an activation is not finite.
    """
    attention, device = layer.self_attn, rope_cos_sin[0].device
    mask, sums, behind = causal_mask(stream.shape[1], device), None, []
    for block in stream:
        states = block[None].to(device)
        x = layer.input_layernorm(states)
        output, weights = attention(x, position_embeddings=rope_cos_sin, attention_mask=mask)
        moments = _moments(append_bias_input(attention, x[0]), weights[0])
        sums = moments if sums is None else [total + new for total, new in zip(sums, moments)]
        behind.append((states + output).to(stream.device))
    if not all(total.isfinite().all() for total in sums):
        raise ValueError(
            f"the attention of layer {attention.layer_idx} is not finite: the checkpoint has NaN or infinite weights"
        )
    return LayerMoments(*(total / len(stream) for total in sums), stream.shape[1]), torch.cat(behind)


def _moments(x, weights):
    """x [length, hidden], weights [heads, length, length] -> the four moments of one block."""
    weights = weights[:, (len(x) - 1) % EVERY :: EVERY]
    averaged = (weights @ x).flatten(0, 1)
    attention = weights.mean((0, 1))  # of each key
    return [x.T @ x / len(x), x.mean(0), averaged.T @ averaged / len(averaged), x.T @ (attention[:, None] * x)]


def append_bias_input(attention, x):
    """x [..., hidden] with a constant 1 behind it if the projections have a bias, so that the bias is one more column."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if attention.q_proj.bias is not None else x


def with_bias(linear):
    """The weight of a projection [out, hidden], its bias as one more column."""
    return linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)


def set_rows(linear, rows):
    """Put changed rows of `with_bias` back into a projection."""
    if linear.bias is not None:
        linear.bias.copy_(rows[:, -1])
    linear.weight.copy_(rows if linear.bias is None else rows[:, :-1])
