"""What a change of the residual stream costs, without running the model on it: slopes of the predictions.

Here one backward pass, a layer at a time, stands for all the forward passes that measured prices take.
"""

import torch
from tqdm import tqdm

from ..measure.stream import (
    after_attention,
    after_layer,
    after_mlp,
    attention_backend,
    each_block,
    each_layer,
    first_stream,
    read_out,
)


@torch.enable_grad()  # whoever asks may need none
def residual_gradients(model, blocks, seed=0):
    """For each layer, ∂ log p(tokens) / ∂ stream behind its attention [blocks, length, hidden], on the CPU.

    The tokens are drawn from the model's own predictions: the mean square of such a slope along a change of the stream is
    twice the KL divergence that the change causes, to second order (Fisher information). One layer is held at a time.
    """
    layers, random = len(model.model.layers), torch.Generator().manual_seed(seed)
    stream, rope_cos_sin = first_stream(model, blocks)
    device, entering, gradients = rope_cos_sin[0].device, [], [None] * layers
    with attention_backend("sdpa", model):
        for _, layer in each_layer(model):
            entering.append(stream)
            stream = each_block(after_layer, layer, stream, rope_cos_sin)
        head = read_out(model)
        slope = torch.cat([score_slope(head, block[None].to(device), random).cpu() for block in stream])
        for index, layer in tqdm(each_layer(model, range(layers - 1, -1, -1)), "gradients", layers, leave=False):
            pairs = [
                layer_slopes(layer, block[None].to(device), its_slope[None].to(device), rope_cos_sin)
                for block, its_slope in zip(entering[index], slope)
            ]
            slope, gradients[index] = (torch.cat(parts).cpu() for parts in zip(*pairs))
    return gradients


def score_slope(head, stream, random):
    """∂ log p(tokens drawn) / ∂ `stream` [1, length, hidden] behind the last layer; `head`: of `read_out`."""
    stream = stream.detach().requires_grad_(True)
    scores = head(stream).log_softmax(-1)[0]
    drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=random).to(scores.device)
    return torch.autograd.grad(scores.gather(-1, drawn).sum(), stream)[0]


def layer_slopes(layer, states, slope, rope_cos_sin):
    """From the slope behind a layer: those at the `states` that enter it, and behind its attention."""
    states = states.detach().requires_grad_(True)
    middle = after_attention(layer, states, rope_cos_sin)
    return torch.autograd.grad(after_mlp(layer, middle), (states, middle), slope)
