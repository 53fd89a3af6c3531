"""How the head budget is shared among layers, and between keys and values: uniformly, by cost, or by measured loss."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .evaluation import token_losses
from .fusion import check_method, fuse_layer, fused_attention, spectral_layers
from .grouping import HeadPlan, best_partitions
from .spectral import mean_cost

ALLOCATIONS = ("uniform", "cost", "loss")
KINDS = ("key", "value")


def plan_heads(model, blocks, budget, method="spectral", allocation="loss", seed=0, layers=None):
    """The `HeadPlan` for a head budget: groups of least cost in every layer, and as many heads in each as it is worth.

    `blocks` [blocks, length]: calibration tokens. `budget`: key and value heads to keep, as a share of the source's.
    `method` ("mean" or "spectral") says by which fusion groups are judged. `allocation`: "uniform", the same counts in
    every layer; "cost", least sum of relative costs; "loss", least sum of the rises in LM loss measured for each layer
    alone, on at most 8 blocks drawn by `seed`. The last two are solved exactly (`knapsack`).

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
            chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:8]
            prices = loss_rises(model, blocks[chosen], partitions, method, layers)
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
def loss_rises(model, blocks, partitions, method="spectral", layers=None):
    """[layers, 2, heads]: the rise of the LM loss (nats a token) if one layer alone keeps n = 1 … heads key (value) heads.

    The model runs from the fused layer on, from hidden states that are kept: half the work. Forced never to rise with n.
    """
    if method == "spectral" and layers is None:
        layers = spectral_layers(model, blocks)
    heads = model.config.num_key_value_heads
    apart = [[h] for h in range(heads)]
    rises = torch.zeros(len(partitions), 2, heads)
    inputs = layer_inputs(model, blocks)
    base = token_losses(model, blocks).mean()
    steps = tqdm(total=rises[..., 1:].numel(), desc="measuring losses", leave=False)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for kind in range(2):
            for n in range(1, heads):
                groups = [apart, apart]
                groups[kind] = partitions[index][kind][n - 1][1]
                fused = fuse_layer(attention, *groups, layers[index] if method == "spectral" else None)
                layer.self_attn = fused_attention(model.config, fused)
                try:
                    rises[index, kind, n - 1] = token_losses(model, blocks, index, inputs[index]).mean() - base
                finally:
                    layer.self_attn = attention
                steps.update()
    steps.close()
    return monotone(rises)


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


def uniform_plan(config, counts):
    """GQA's way: contiguous groups of nearly equal size, counts[layer] = (key heads, value heads) of them."""
    plans = [HeadPlan.uniform(config, *count) for count in counts]
    return HeadPlan([plan.key_groups[0] for plan in plans], [plan.value_groups[0] for plan in plans])


def knapsack(prices, heads):
    """Counts [layers, 2] of at least one head each, `heads` in all, with the least sum of `prices` [layers, 2, n].

    Exact, by dynamic programming over the layers: the least price of every total so far.

    Raises ValueError if no counts add up to `heads`.
    """
    items = np.asarray(prices, dtype=float).reshape(-1, np.shape(prices)[-1])
    if not len(items) <= heads <= items.size:
        raise ValueError(f"{heads} heads cannot be shared among {len(items)} places of 1 to {items.shape[1]} heads")
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
