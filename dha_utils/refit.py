"""Fit a fused model to its source layer by layer, on calibration text: no gradient passes from one layer to another.

The closed form treats keys and values apart, and every layer as if those before it were still the source's. Here the
q, k, v and o weights of each fused layer are moved together, from what really enters the layer, towards the source's
attention output.
"""

import copy

import pandas as pd
import torch
from tqdm import tqdm


def refit(fused, source, blocks, epochs=4, learning_rate=1e-3, blocks_per_step=2, seed=0):
    """(a copy of the DHA model `fused`, refitted to `source`; a table of the errors, a row a layer).

    `blocks` [blocks, length]: calibration tokens; every fourth is held out. The error of a layer is
    E‖attention of the fused layer − attention of the source layer‖² / ‖residual stream of the source‖² over tokens: what
    the next RMSNorm will see of it, and no massive activation outweighs all others. A layer whose held-out error did not
    fall keeps its weights. Adam with a cosine to zero.

    Raises ValueError with fewer than four blocks.
    """
    if len(blocks) < 4:
        raise ValueError(f"a refit needs at least 4 calibration blocks, to hold one out, not {len(blocks)}")
    fused, random = copy.deepcopy(fused), torch.Generator().manual_seed(seed)
    blocks = blocks.to(source.device)
    held_out = torch.arange(len(blocks)) % 4 == 3
    with torch.no_grad():
        theirs = source.model.embed_tokens(blocks)  # what enters the layer in the source …
        ours = theirs.clone()  # … and in the fused model
        turns = source.model.rotary_emb(theirs, torch.arange(blocks.shape[1], device=blocks.device)[None])
    rows = []
    for layer, fused_layer in tqdm(list(zip(source.model.layers, fused.model.layers)), "refit", leave=False):
        target = each_block(lambda x, layer=layer: attention_output(layer, x, turns), theirs)
        weight = (theirs + target).square().sum(-1, keepdim=True).reciprocal()
        fit = LayerFit(fused_layer, ours, target, weight, turns)
        before, weights = fit.error(held_out), copy.deepcopy(fused_layer.self_attn.state_dict())
        fit.run(torch.nonzero(~held_out).flatten(), epochs, learning_rate, blocks_per_step, random)
        after = fit.error(held_out)
        if after >= before:
            fused_layer.self_attn.load_state_dict(weights)
        rows.append({"before": before, "after": min(before, after), "kept": after < before})
        theirs, ours = (
            each_block(lambda x, part=part: part(x, position_embeddings=turns), states)
            for part, states in ((layer, theirs), (fused_layer, ours))
        )
    return fused, pd.DataFrame(rows).rename_axis("layer")


class LayerFit:
    """One fused layer, what enters it [blocks, length, hidden], and the attention output it should give there."""

    def __init__(self, layer, states, target, weight, turns):
        self.layer, self.states, self.target, self.weight, self.turns = layer, states, target, weight, turns

    def loss(self, chosen):
        output = attention_output(self.layer, self.states[chosen], self.turns)
        return ((output - self.target[chosen]).square() * self.weight[chosen]).sum(-1).mean()

    @torch.no_grad()
    def error(self, chosen):
        return sum(self.loss([int(i)]).item() for i in torch.nonzero(chosen)) / int(chosen.sum())

    def run(self, fitted, epochs, learning_rate, blocks_per_step, random):
        optimizer = torch.optim.Adam(self.layer.self_attn.parameters(), lr=learning_rate, betas=(0.9, 0.95))
        steps = epochs * -(-len(fitted) // blocks_per_step)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for chosen in fitted[torch.randperm(len(fitted), generator=random)].split(blocks_per_step):
                optimizer.zero_grad()
                self.loss(chosen).backward()
                optimizer.step()
                schedule.step()


def attention_output(layer, hidden_states, turns):
    """What the attention of a decoder layer adds to the residual stream: [batch, length, hidden]."""
    return layer.self_attn(layer.input_layernorm(hidden_states), position_embeddings=turns, attention_mask=None)[0]


@torch.no_grad()
def each_block(function, states):
    return torch.cat([function(block[None]) for block in states])
