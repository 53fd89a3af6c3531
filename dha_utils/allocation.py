"""How the head budget is shared among layers, and between keys and values: uniformly, by cost, or by measured loss."""

from contextlib import contextmanager
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import kl_div
from tqdm import tqdm

from .evaluation import log_probabilities, true_losses
from .fusion import check_method, fuse, fuse_layer, fused_attention, spectral_layers
from .grouping import HeadPlan, best_partitions
from .spectral import mean_cost
from .text import drawn

ALLOCATIONS = ("uniform", "cost", "loss")
KINDS = ("key", "value")
SENSITIVITY_TOKENS = 4096  # every layer costs forward passes over them; more move the plan little


def plan_heads(model, blocks, budget, method="spectral", allocation="loss", seed=0, layers=None):
    """The `HeadPlan` for a head budget: groups of least cost in every layer, and as many heads in each as it is worth.

    `blocks` [blocks, length]: calibration tokens. `budget`: key and value heads to keep, as a share of the source's.
    `method` ("mean" or "spectral") says by which fusion groups are judged. `allocation`: "uniform", the same counts in
    every layer; "cost", least sum of relative costs; "loss", least sum of measured rises of the loss (`loss_rises`, its
    text drawn by `seed`). The last two are solved exactly (`knapsack`).

    Raises ValueError if the budget is not in (0, 1] or below one key and one value head a layer, or a name is unknown.
    """
    heads = heads_for_budget(model.config, budget)
    if allocation not in ALLOCATIONS:
        raise ValueError(f"there is no allocation {allocation!r}: choose one of {', '.join(ALLOCATIONS)}")
    partitions = group_heads(model, blocks, method, layers)
    if allocation == "uniform":
        counts = uniform_counts(model.config, heads)
    else:
        if allocation == "cost":
            prices = partition_costs(partitions)
        else:
            prices = loss_rises(model, blocks, method, seed)
        counts = knapsack(prices, heads)
    return plan_of_counts(partitions, counts)


def heads_for_budget(config, budget):
    """The number of key and value heads, over all layers, that `budget` comes to (rounded to the nearest)."""
    if not 0 < budget <= 1:
        raise ValueError(f"a head budget is a share of the source's heads, above 0 and at most 1, not {budget}")
    source = 2 * config.num_hidden_layers * config.num_key_value_heads
    heads = round(budget * source)
    if heads < 2 * config.num_hidden_layers:
        raise ValueError(
            f"a budget of {budget} is {heads} of {source} heads, but {config.num_hidden_layers} layers need one key and "
            f"one value head each: the smallest budget for this model is {least_budget(config):.4f}"
        )
    return heads


def least_budget(config):
    """One key head and one value head a layer."""
    return 1 / config.num_key_value_heads


def group_heads(model, blocks, method="spectral", layers=None):
    """For each layer and kind, the best partition into n = 1 … heads groups: [layer][kind][n − 1] = (cost, groups).

    Costs are relative: the share lost of the energy of all heads of that layer and kind.
    """
    check_method(method)
    if method == "spectral" and layers is None:
        layers = spectral_layers(model, blocks)
    partitions = []
    for index, layer in enumerate(tqdm(model.model.layers, "grouping", leave=False)):
        costs = layers[index].costs() if method == "spectral" else mean_cost(layer.self_attn)
        partitions.append([best_partitions(cost, model.config.num_key_value_heads) for cost in costs])
    return partitions


def partition_costs(partitions):
    """[layers, 2, heads]: the relative cost of keeping n = 1 … heads key (value) heads, never rising with n."""
    return monotone(torch.tensor([[[cost for cost, _ in kind] for kind in layer] for layer in partitions]))


@torch.no_grad()
def loss_rises(model, blocks, method="spectral", seed=0):
    """[layers, 2, heads]: the rise of the LM loss (nats a token) if one layer keeps n = 1 … heads key (value) heads.

    `blocks` [blocks, length]: calibration tokens; of more than `SENSITIVITY_TOKENS`, so many are drawn by `seed`. Every
    second block makes the groups and the fusion, the others measure: measured on the text it was fitted to, sharing
    looks cheaper than it is, values most. Two estimates are averaged, the rise of the loss itself, which is noisy, and
    the divergence from the source's predictions, which would be the same if the source were always right. Single rises
    add up to less than all layers cost together, by another factor for keys than for values; so each estimate is scaled
    to the rise of the loss with n heads in every layer at once. Forced never to rise with n.

    Raises ValueError with fewer than two blocks.
    """
    if len(blocks) < 2:
        raise ValueError("measuring losses needs at least 2 calibration blocks: one half makes the fusion, one measures it")
    blocks = drawn(blocks, max(2, SENSITIVITY_TOKENS // blocks.shape[1]), seed)
    fitted, held_out = blocks[0::2], blocks[1::2]
    layers = spectral_layers(model, fitted) if method == "spectral" else None
    partitions = group_heads(model, fitted, method, layers)
    heads = model.config.num_key_value_heads
    inputs, reference = layer_inputs(model, held_out), list(log_probabilities(model, held_out))
    rises, together = torch.zeros(2, len(partitions), 2, heads), torch.zeros(2, heads)
    with tqdm(total=rises[0, ..., 1:].numel(), desc="measuring losses", leave=False) as steps:
        for kind, n in product(range(2), range(1, heads)):
            for index in range(len(partitions)):
                groups = partitions[index][kind][n - 1][1]
                with fused_in_place(model, index, KINDS[kind], groups, layers):
                    predictions = log_probabilities(model, held_out, index, inputs[index])
                    rises[:, index, kind, n - 1] = rise_and_divergence(predictions, reference, held_out)
                steps.update()
            counts = [[n, heads] if kind == 0 else [heads, n]] * len(partitions)
            fused = fuse(model, plan_of_counts(partitions, counts), method=method, layers=layers)
            together[kind, n - 1] = rise_and_divergence(log_probabilities(fused, held_out), reference, held_out)[0]
    rises = monotone(rises)
    scale = together / rises.sum(1, keepdim=True).clamp(min=1e-6)
    return monotone((rises * scale.clamp(min=0)).mean(0))


def rise_and_divergence(predictions, reference, blocks):
    """The rise of the LM loss over the `reference`, and the KL divergence from it, nats a token: [2].

    Both are `log_probabilities` of `blocks`.
    """
    rows = [
        [
            (true_losses(new, block) - true_losses(old, block)).mean(),
            kl_div(new, old, reduction="batchmean", log_target=True),
        ]
        for new, old, block in zip(predictions, reference, blocks)
    ]
    return torch.tensor(rows).mean(0)


@contextmanager
def fused_in_place(model, index, kind, groups, layers=None):
    """Layer `index` of the source `model` shares its "key" or "value" heads by `groups`, for the time of a `with` block.

    `layers`: what `spectral_layers` gives; without it the heads are mean-pooled.
    """
    layer = model.model.layers[index]
    attention = layer.self_attn
    alone = [[head] for head in range(model.config.num_key_value_heads)]
    pair = (groups, alone) if kind == "key" else (alone, groups)
    fused = fuse_layer(attention, *pair, layers[index] if layers else None)
    layer.self_attn = fused_attention(model.config, fused)
    try:
        yield
    finally:
        layer.self_attn = attention


@torch.no_grad()
def layer_inputs(model, blocks):
    """The hidden states [blocks, length, hidden] that enter each layer."""
    states = [model.model(block[None].to(model.device), output_hidden_states=True, use_cache=False) for block in blocks]
    return [torch.cat(layer) for layer in zip(*(state.hidden_states[:-1] for state in states))]


def monotone(prices):
    """No price rises with the number of heads, and all heads cost nothing: measured noise would break both."""
    prices = prices.clone()
    prices[..., -1] = 0
    return prices.flip(-1).cummax(-1).values.flip(-1)


def uniform_counts(config, heads):
    """[layers, 2]: the same counts everywhere as far as `heads` divides, the rest to keys first, from the first layer."""
    slots = 2 * config.num_hidden_layers
    counts = np.full(slots, heads // slots)
    counts[: heads % slots] += 1
    return counts.reshape(2, -1).T.tolist()


def uniform_plan(config, heads):
    """GQA's way: `heads` key and value heads in all, as `uniform_counts` spreads them, in contiguous groups."""
    return neighbours_plan(config, uniform_counts(config, heads))


def neighbours_plan(config, counts):
    """Contiguous groups of nearly equal size, counts[layer] = (key heads, value heads) of them."""
    plans = [HeadPlan.uniform(config, *count) for count in counts]
    return HeadPlan([plan.key_groups[0] for plan in plans], [plan.value_groups[0] for plan in plans])


def knapsack(prices, heads):
    """Counts [layers, 2] of at least one head each, `heads` in all, with the least sum of `prices` [layers, 2, n].

    Exact, by dynamic programming over the layers: the least price of every total so far.

    Raises ValueError if no counts add up to `heads`.
    """
    items = np.asarray(prices, dtype=float).reshape(-1, np.shape(prices)[-1])
    check_total(heads, items)
    best, choices = np.zeros(1), []
    for price in items:
        totals = np.full((len(price), len(best) + len(price)), np.inf)  # row n - 1: this place keeps n heads
        for n in range(1, len(price) + 1):
            totals[n - 1, n : n + len(best)] = best + price[n - 1]
        choices.append(totals.argmin(0) + 1)
        best = totals.min(0)
    counts = []
    for choice in reversed(choices):
        counts.append(int(choice[heads]))
        heads -= counts[-1]
    return np.reshape(counts[::-1], (-1, 2)).tolist()


def check_total(heads, items):
    """`items` [places, n]: every place takes 1 to n heads."""
    if not len(items) <= heads <= items.size:
        raise ValueError(f"{heads} heads cannot be shared among {len(items)} places of 1 to {items.shape[1]} heads")


def plan_of_counts(partitions, counts):
    """The `HeadPlan` that keeps counts[layer] = (key heads, value heads), in the best groups."""
    key, value = ([layer[kind][count[kind] - 1][1] for layer, count in zip(partitions, counts)] for kind in range(2))
    return HeadPlan(key, value)


def plan_price(prices, plan):
    """The sum of `prices` [layers, 2, heads] over what a plan keeps."""
    counts = zip(plan.key_heads, plan.value_heads)
    return sum(float(prices[layer, kind, n - 1]) for layer, pair in enumerate(counts) for kind, n in enumerate(pair))


def price_table(prices):
    """[layers, 2, heads] as a table: a row per layer and kind, a column per number of heads kept."""
    layers, kinds, heads = np.shape(prices)
    index = pd.MultiIndex.from_product([range(layers), KINDS], names=["layer", "kind"])
    columns = pd.RangeIndex(1, heads + 1, name="heads kept")
    return pd.DataFrame(np.reshape(prices, (-1, heads)), index, columns)


def read_prices(path):
    """The inverse of `price_table(prices).to_csv(path)`: a tensor [layers, 2, heads]."""
    table = pd.read_csv(path, index_col=["layer", "kind"])
    return torch.tensor(table.to_numpy()).unflatten(0, (-1, 2))
