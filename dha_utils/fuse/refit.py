"""Fit a fused model to its source layer by layer, on calibration text: no gradient passes from one layer to another.

The closed form treats keys and values apart, and every layer as if those before it were still the source's. Here each
layer is moved, from the stream that really enters it, towards the residual stream of the source: first its attention,
then the whole layer, whose MLP makes up for the rest.
"""

import copy

import pandas as pd
import torch
from tqdm import tqdm

from ..measure.stream import (
    after_attention,
    after_layer,
    attention_backend,
    each_block,
    each_layer,
    first_stream,
    in_float32,
)
from ..sources.families import check_source
from ..sources.precision import as_float64
from ..sources.text import HELD_OUT

EXACT = 1e-9  # a relative squared error that is rounding: nothing to mend
WELL = 0.9  # a round of gradient steps that leaves less than this of the error is followed by another
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # of the mean energy of the inputs of o_proj


def refit(fused, source, blocks, epochs=2, learning_rate=2e-3, layer_epochs=1, layer_learning_rate=3e-4, seed=0):
    """(a copy of the DHA model `fused`, refitted to `source`; a table of the errors, one row per layer and stage).

    `blocks` [blocks, length]: calibration tokens; every fourth is held out. An error is
    E‖stream of the fused model − stream of the source‖² / ‖stream of the source‖² over tokens: relative, as the
    next RMSNorm sees it, so that no massive activation outweighs all others. The stage "attention" moves the attention and
    reads the stream behind it; "output" solves for o_proj, its inputs given, with a ridge that keeps it near; "layer"
    moves all weights of the layer and reads the stream behind that. A stage that does not lower the held-out error behind
    the layer is undone. Gradient steps go in rounds of `epochs`: Adam, one block a step, with a cosine to zero. A round
    that took a tenth of the error away is followed by another, one that was undone by one at a quarter of the rate.
    `layer_epochs=0` leaves the MLP alone. Twice the text serves better than twice the epochs.
    Everything is computed in float32 and by SDPA, whatever the models' dtype and attention backend.

    Raises ValueError with fewer than four blocks, or as `check_source` does.
    """
    check_source(source)
    if len(blocks) < 4:
        raise ValueError(f"a refit needs at least 4 calibration blocks, to hold one out, not {len(blocks)}")
    fused, random = copy.deepcopy(fused).requires_grad_(True), torch.Generator().manual_seed(seed)
    source_stream, rope_cos_sin = first_stream(source, blocks)
    fused_stream, rows = source_stream.clone(), []
    settings = {"epochs": epochs, "learning_rate": learning_rate}
    settings |= {"layer_epochs": layer_epochs, "layer_learning_rate": layer_learning_rate}
    with attention_backend("sdpa", source, fused):  # by hand, without a mask, others are not causal
        for index, source_layer in tqdm(each_layer(source), "refit", len(fused.model.layers), leave=False):
            layer = in_float32(fused.model.layers[index])
            errors, source_stream, fused_stream = refit_layer(
                source_layer, layer, source_stream, fused_stream, rope_cos_sin, random, fused.dtype, **settings
            )
            fused.model.layers[index].load_state_dict(layer.state_dict())
            rows += [{"layer": index, "stage": stage} | error for stage, error in errors.items()]
    return fused, pd.DataFrame(rows).set_index(["layer", "stage"])


def refit_layer(
    source_layer,
    layer,
    source_stream,
    fused_stream,
    rope_cos_sin,
    random,
    dtype=torch.float32,
    epochs=2,
    learning_rate=2e-3,
    layer_epochs=1,
    layer_learning_rate=3e-4,
):
    """Fits one fused decoder `layer`, in place, to its `source_layer`, both in float32: `refit` says how.

    The streams [blocks, length, hidden] are those that enter the layer in the source and in the fused model; `random`: the
    generator of the order of the blocks; `dtype`: the one that the weights will be kept in, to which they are rounded.
    Returns (errors {stage: …}, the source's stream behind the layer, the fused model's).
    """
    device = rope_cos_sin[0].device
    behind = {
        output: each_block(output, source_layer, source_stream, rope_cos_sin).to(device)
        for output in (after_attention, after_layer)
    }
    fit = LayerFit(layer, fused_stream.to(device), behind, rope_cos_sin, dtype)
    errors = {
        "attention": fit.improve(after_attention, layer.self_attn, epochs, learning_rate, random),
        "output": fit.solve_output(),
        "layer": fit.improve(after_layer, layer, layer_epochs, layer_learning_rate, random),
    }
    round_weights(layer, dtype)
    return errors, behind[after_layer].cpu(), each_block(after_layer, layer, fused_stream, rope_cos_sin)


class LayerFit:
    """A fused layer, the states [blocks, length, hidden] that enter it, and the streams {function: stream} to be met.

    `dtype`: the one that the weights, here in float32, are kept in.
    """

    def __init__(self, layer, states, streams, rope_cos_sin, dtype=torch.float32):
        self.layer, self.states, self.streams, self.rope_cos_sin, self.dtype = layer, states, streams, rope_cos_sin, dtype
        self.held_out = torch.zeros(len(states), dtype=torch.bool)
        self.held_out[HELD_OUT] = True
        self.error = self.measured_error()

    def loss(self, output, chosen):
        target = self.streams[output][chosen]
        errors = (output(self.layer, self.states[chosen], self.rope_cos_sin) - target).square().sum(-1)
        return (errors / target.square().sum(-1)).mean()

    @torch.no_grad()
    def measured_error(self):
        """Behind the layer, on the held-out blocks."""
        return torch.stack([self.loss(after_layer, [int(i)]) for i in torch.nonzero(self.held_out)]).mean().item()

    def improve(self, output, part, epochs, learning_rate, random):
        """Move the weights of `part` until `output` meets its stream, while that lowers the held-out error well."""
        before, rates = self.error, [learning_rate, learning_rate / 4]
        while epochs and rates and self.error > EXACT:
            last, weights = self.error, copy.deepcopy(part.state_dict())
            self.descend(output, part, epochs, rates[0], random)
            if not self.keep(part, weights):
                del rates[0]
            elif self.error > WELL * last:
                break
        return {"before": before, "after": self.error, "kept": self.error < before}

    @torch.no_grad()
    def solve_output(self):
        """Move o_proj by ridge regression on the fitted blocks, with the ridge that serves the held-out stream best."""
        before, output = self.error, self.layer.self_attn.o_proj
        if before > EXACT:
            (energy, cross), unseen = (self.output_moments(output, part) for part in (~self.held_out, self.held_out))
            scale = energy.diagonal().mean() * torch.eye(len(energy)).to(energy)
            moves = (torch.linalg.solve(energy + ridge * scale, cross) for ridge in RIDGES)
            weights = copy.deepcopy(output.state_dict())
            output.weight.add_(min(moves, key=lambda move: error_change(move, *unseen)).T.to(output.weight))
            self.keep(output, weights)
        return {"before": before, "after": self.error, "kept": self.error < before}

    def keep(self, part, weights):
        """Whether `part`, moved, has lowered the held-out error; if not, its `weights` from before are put back."""
        round_weights(part, self.dtype)  # as they are kept, so is their error
        after = self.measured_error()
        if after < self.error:
            self.error = after
            return True
        part.load_state_dict(weights)
        return False

    def output_moments(self, output, chosen_blocks):
        """Σ x xᵀ and Σ x eᵀ over the tokens of the blocks that the mask `chosen_blocks` [blocks] names.

        x is the input of o_proj, e the error of the stream, both over the stream's norm.
        """
        read, energy, cross = [], 0, 0
        hook = output.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        for chosen in torch.nonzero(chosen_blocks):
            target = self.streams[after_attention][chosen]
            lacking = target - after_attention(self.layer, self.states[chosen], self.rope_cos_sin)
            norm = target.square().sum(-1, keepdim=True).sqrt()
            x, e = ((part / norm).flatten(0, 1) for part in (read.pop(), lacking))
            energy, cross = energy + as_float64(x.T @ x), cross + as_float64(x.T @ e)
        hook.remove()
        return energy, cross

    def descend(self, output, part, epochs, learning_rate, random):
        fitted = torch.nonzero(~self.held_out).flatten()
        optimizer = torch.optim.Adam(part.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(fitted))
        for _ in range(epochs):
            for chosen in fitted[torch.randperm(len(fitted), generator=random)].split(1):
                optimizer.zero_grad()
                self.loss(output, chosen).backward()
                optimizer.step()
                schedule.step()


def round_weights(part, dtype):
    """The float32 weights of a module as they will be once they are kept in `dtype`."""
    for weight in part.parameters():
        weight.data = weight.data.to(dtype).float()


def error_change(move, energy, cross):
    """The change of Σ ‖e‖², over the tokens of these moments, if `move` is added to the weight of o_proj, transposed."""
    return ((energy @ move - 2 * cross) * move).sum().item()
