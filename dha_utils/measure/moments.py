"""Second moments of the inputs of each attention layer on a calibration text, gathered in one pass."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..sources.checkpoints import check_source

EVERY = 4  # one query in so many tells its attention: its neighbours see nearly the same


@dataclass
class LayerMoments:
    """Moments of the attention input x of one layer, [hidden, hidden]; with attention bias x ends in a constant 1.

    `plain`: E[x xᵀ] over tokens. `mean`: E[x], [hidden].
    `attended`: E[(A_h x)(A_h x)ᵀ] over queries: the averages that the values of head h are made from.
    `seen`: E[x xᵀ] over keys, each weighted by the attention it gets from the same queries. `seen` − `attended` is the
    covariance within a query, all that a softmax can see of the keys. Both are means over the heads.
    """

    plain: Tensor
    mean: Tensor
    attended: Tensor
    seen: Tensor


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


@torch.no_grad()
def collect_moments(model, blocks):
    """One `LayerMoments` per layer of a LLaMA `model`, from `blocks` [blocks, length] of calibration tokens.

    In float32 whatever the model's dtype: products of activations overflow in float16, and sums lose digits in bfloat16.

    Raises ValueError as `check_source` does, or if an activation is not finite.
    """
    check_source(model)
    layers = [layer.self_attn for layer in model.model.layers]
    inputs, sums = [None] * len(layers), [None] * len(layers)

    def watch(index, attention):
        def keep(q_proj, args):
            inputs[index] = args[0][0]

        def record(attention, args, output):
            update = _moments(append_bias_input(attention, inputs[index].float()), output[1][0].float())
            sums[index] = update if sums[index] is None else [a + b for a, b in zip(sums[index], update)]

        return attention.q_proj.register_forward_pre_hook(keep), attention.register_forward_hook(record)

    hooks = [hook for index, attention in enumerate(layers) for hook in watch(index, attention)]
    try:
        with attention_backend("eager", model):  # the only one that hands out attention weights
            for block in tqdm(blocks, "moments", leave=False):
                model.model(block[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for index, layer in enumerate(sums):
        if not all(total.isfinite().all() for total in layer):
            raise ValueError(
                f"the attention of layer {index} is not finite: the checkpoint has NaN or infinite weights, or overflows "
                f"in {model.dtype}: try bfloat16 or float32"
            )
    return [LayerMoments(*(total / len(blocks) for total in layer)) for layer in sums]


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
