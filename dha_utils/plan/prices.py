"""The price of every number of heads in a layer: the increase of the loss, measured layer by layer."""

from contextlib import contextmanager
from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import PchipInterpolator
from scipy.stats import spearmanr
from torch.nn.functional import kl_div
from tqdm import tqdm

from ..fuse.layer import fuse_layer, fused_attention
from ..fuse.model import check_method
from ..measure.energies import HeadEnergies
from ..measure.moments import layer_moments
from ..measure.perplexity import true_losses
from ..measure.stream import (
    after_attention,
    after_layer,
    after_mlp,
    attention_backend,
    each_block,
    each_layer,
    first_stream,
    next_token_scores,
)
from .gradients import residual_gradients
from .partition import EXACT_HEADS, layer_partitions, monotone, never_rising

KINDS = ("key", "value")
ALONE = ("measured", "layer")  # ways to the price of one layer alone
REFIT_LEAVES = (0.4, 1.0)  # of the cost of shared keys and of shared values
MEASURED_PIECES, MEASURED_TOKENS = 8, 1024  # many short pieces: texts differ more than the tokens of one do
PREDICTED_EVERY = 2  # one token in so many is predicted: with a large vocabulary the head costs as much as the layers


def loss_increase(model, blocks, method="spectral", alone="layer"):
    """[layers, 2, heads]: the increase of the LM loss (nats per token) if one layer keeps n = 1 … heads key (value) heads.

    `blocks` [blocks, length]: calibration tokens. `MEASURED_PIECES` of them, at most half, cut to `MEASURED_TOKENS` in
    all, measure; the others make the groups and the fusion: measured on the text it was fitted to, sharing looks cheaper
    than it is, values most. The increase by one layer alone is estimated by the KL divergence from the source's
    predictions: that of the loss on so few tokens is noise, for a layer that matters little even in its sign. `alone`:
    "layer", to second order, from that layer and one backward pass (`residual_gradients`); "measured", by running the rest
    of the model, which must be in memory, once for each case (`benchmarks/layer_prices.py` compares them). Single
    divergences add up to less than all layers cost together, by another factor for keys than for values; so they are scaled
    to the increase of the loss with n heads in every layer at once. Priced for the n of `head_grid`, between them
    interpolated; never rising with n.

    Raises ValueError with fewer than two blocks, if `alone` is unknown, or "measured" of a model that is not in memory.
    """
    walk = PriceWalk(model, blocks, method, alone)
    steps = tqdm(each_layer(model), "pricing", len(model.model.layers), leave=False)
    return walk.prices([walk.price(index, layer)[1] for index, layer in steps])


class PriceWalk:
    """The walk through the layers of `loss_increase`.

    `streams` {name: [blocks, length, hidden]}, all before the same layer: "fitted" and "held out" of the source, and of the
    held-out pieces in a model all of whose layers share, "key n" and "value n" by the number of heads they keep.
    """

    def __init__(self, model, blocks, method="spectral", alone="layer"):
        check_method(method)
        if alone not in ALONE:
            raise ValueError(f"there is no way {alone!r} to price one layer alone: choose one of {', '.join(ALONE)}")
        if alone == "measured" and hasattr(model, "shards"):
            raise ValueError("prices cannot be measured on a model that is read a layer at a time: choose alone='layer'")
        if len(blocks) < 2:
            raise ValueError(
                "measuring losses needs at least 2 calibration blocks: some make the fusion, others measure it"
            )
        self.model, self.method = model, method
        self.grid = head_grid(model.config.num_key_value_heads)
        fitted, self.held_out = split_blocks(blocks)
        first, self.fitted_rope = first_stream(model, fitted)
        pieces, self.rope = first_stream(model, self.held_out)
        together = {f"{kind} {n}": pieces.clone() for kind, n in product(KINDS, self.grid)}
        self.streams = {"fitted": first, "held out": pieces} | together
        self.gradients, self.reference = None, None
        if alone == "layer":
            self.gradients = residual_gradients(model, self.held_out)
        else:
            with torch.no_grad(), attention_backend("sdpa", model):
                self.reference = predictions(model, 0, pieces)

    @torch.no_grad()
    def price(self, index, layer):
        """(partitions [2][heads] of the heads of a layer, the divergence [2, grid] if it alone shares them).

        Carries the streams behind the layer.
        """
        energies, pieces, divergence = None, self.streams["held out"], torch.zeros(2, len(self.grid))
        if self.method == "spectral":
            with attention_backend("eager", self.model):
                moments, behind = layer_moments(layer, self.streams["fitted"], self.fitted_rope)
            self.streams["fitted"] = each_block(after_mlp, layer, behind, self.fitted_rope)
            energies = HeadEnergies.measure(layer.self_attn, self.model.model.rotary_emb, moments)
        partitions = layer_partitions(layer.self_attn, energies)
        alone = [[head] for head in range(len(partitions[0]))]
        with attention_backend("sdpa", self.model):
            unshared = each_block(after_attention, layer, pieces, self.rope)
            for (kind, name), (place, n) in product(enumerate(KINDS), enumerate(self.grid)):
                groups = partitions[kind][n - 1][1]
                pair = (groups, alone) if name == "key" else (alone, groups)
                with shared_in_place(self.model.config, layer, *pair, energies):
                    shared = each_block(after_attention, layer, pieces, self.rope)
                    together = each_block(after_layer, layer, self.streams[f"{name} {n}"], self.rope)
                self.streams[f"{name} {n}"] = together
                divergence[kind, place] = self.divergence(index, layer, shared, unshared)
            self.streams["held out"] = each_block(after_mlp, layer, unshared, self.rope)
        return partitions, divergence

    def divergence(self, index, layer, shared, unshared):
        """KL divergence from the source, nats per token, if the stream behind the attention of a layer is `shared`."""
        if self.gradients is not None:
            return (self.gradients[index] * (shared - unshared)).sum(-1).square().mean() / 2
        behind = each_block(after_mlp, layer, shared, self.rope)
        prediction = predictions(self.model, index + 1, behind)
        return kl_div(prediction, self.reference, reduction="none", log_target=True).sum(-1).mean()

    @torch.no_grad()
    def prices(self, divergences):
        """`loss_increase` from the divergences [2, grid] of all layers, once the streams are behind the last one."""
        true = self.held_out[:, 1::PREDICTED_EVERY]

        def loss(name):
            scores = next_token_scores(self.model, self.streams[name][:, :-1:PREDICTED_EVERY])
            return torch.stack([true_losses(score, block).mean() for score, block in zip(scores, true)]).mean().item()

        together = torch.tensor([[loss(f"{kind} {n}") for n in self.grid] for kind in KINDS]) - loss("held out")
        heads = self.model.config.num_key_value_heads
        single = never_rising(torch.stack(divergences))
        scale = together / single.sum(0).clamp(min=1e-6)
        return monotone(interpolated(never_rising(single * scale.clamp(min=0)), self.grid, heads))


def head_grid(heads):
    """The numbers of heads, below all of them, that are priced: each where the search is exact, else 1, 2, 4, … and 3/4."""
    if heads <= EXACT_HEADS:
        return list(range(1, heads))
    powers = [2**i for i in range(heads.bit_length()) if 2**i <= heads / 2]
    return [*powers, heads * 3 // 4]


def interpolated(prices, grid, heads):
    """Prices [layers, 2, grid] for every number of heads [layers, 2, heads], all of them costing nothing.

    Raises ValueError if one is not finite.
    """
    if not prices.isfinite().all():
        layers = (~prices.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"the cost of sharing heads is not finite in layers {layers}: the model overflows on this text; give a plan"
        )
    if not grid:
        return torch.zeros(*prices.shape[:2], heads)
    ends = torch.cat([prices, torch.zeros_like(prices[..., :1])], -1)
    return torch.from_numpy(
        PchipInterpolator([*grid, heads], ends.double().numpy(), axis=-1)(np.arange(1, heads + 1))
    ).float()


def predictions(model, first_layer, stream, every=PREDICTED_EVERY):
    """Log-probabilities [pieces, tokens, vocabulary] by the rest of the model of all that enters a layer, at once."""
    layers = model.model.layers
    model.model.layers = layers[first_layer:]
    try:
        states = model.model(inputs_embeds=stream.to(model.device, model.dtype), use_cache=False).last_hidden_state
    finally:
        model.model.layers = layers
    return model.lm_head(states[:, :-1:every]).float().log_softmax(-1)


def after_refit(increases):
    """The part of `increases` [layers, 2, heads], as of `loss_increase`, that a refit is expected to leave.

    Other queries make up for more than half of the cost of shared keys; shared values, whose product with the output
    projection the closed form has made as good as it can be, gain little. With the 0.4 of `REFIT_LEAVES`, smollm2-135m
    at half of its heads, refitted on 16,384 tokens, had a perplexity 2.6 % lower than planned for the loss as measured,
    on training text that had calibrated nothing; with 0.25 and with 0.7 it ended between the two.
    """
    return increases * torch.tensor(REFIT_LEAVES).to(increases)[:, None]


def split_blocks(blocks):
    """(the blocks that make the fusion, the evenly spaced pieces that measure it), for `loss_increase`."""
    count = min(len(blocks) // 2, MEASURED_PIECES)
    chosen = torch.zeros(len(blocks), dtype=torch.bool)
    chosen[(2 * torch.arange(count) + 1) * len(blocks) // (2 * count)] = True
    return blocks[~chosen], blocks[chosen, : MEASURED_TOKENS // count]


@contextmanager
def shared_in_place(config, layer, key_groups, value_groups, energies=None):
    """A decoder `layer` shares its heads by these groups for the time of a `with` block, mean-pooled without `energies`."""
    attention = layer.self_attn
    layer.self_attn = fused_attention(config, fuse_layer(attention, key_groups, value_groups, energies))
    try:
        yield
    finally:
        layer.self_attn = attention


def plan_price(prices, plan):
    """The sum of `prices` [layers, 2, heads] over the heads that a plan keeps."""
    counts = zip(plan.key_heads, plan.value_heads)
    return sum(float(prices[layer, kind, n - 1]) for layer, pair in enumerate(counts) for kind, n in enumerate(pair))


def price_table(prices):
    """[layers, 2, heads] as a table: one row per layer and kind, one column per number of heads kept."""
    layers, kinds, heads = np.shape(prices)
    index = pd.MultiIndex.from_product([range(layers), KINDS], names=["layer", "kind"])
    columns = pd.RangeIndex(1, heads + 1, name="heads kept")
    return pd.DataFrame(np.reshape(prices, (-1, heads)), index, columns)


def read_prices(path):
    """The inverse of `price_table(prices).to_csv(path)`: a tensor [layers, 2, heads]."""
    table = pd.read_csv(path, index_col=["layer", "kind"])
    return torch.tensor(table.to_numpy()).unflatten(0, (-1, 2))


def price_agreement(rows):
    """Spearman's ρ of prices from the layer alone with the measured ones, and the minutes of each way: a Series.

    `rows`: of `benchmarks/layer_prices.py`, one model.
    """
    figures = {}
    for way in ("slopes", "stream"):
        for kind, chosen in rows.groupby("kind"):
            figures[way, f"ρ, {kind}s"] = spearmanr(chosen[way], chosen["measured"]).statistic
    for way in ("measured", "slopes", "stream"):
        figures[way, "minutes"] = rows[f"{way}_seconds"].iloc[0] / 60
    return pd.Series(figures)
