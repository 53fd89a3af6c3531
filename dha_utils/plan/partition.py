"""The search for the groups of heads that lose least by sharing.

Costs are functions of a group (a tuple of source heads); the cost of a partition is their sum.
"""

from functools import lru_cache
from itertools import combinations

import torch
from tqdm import tqdm

from ..fuse.mean import mean_cost
from ..fuse.model import check_method
from ..measure.energies import head_energies
from ..measure.similarity import pair_table
from ..measure.stream import each_layer
from .head_plan import HeadPlan
from .many_heads import Groups, ValueGroups, many_partitions

EXACT_HEADS = 9  # Up to here every partition is looked at: 21,147 of them at 9 heads


def pairwise_cost(matrix):
    """A group's cost from a [heads, heads] matrix of pairwise costs: the sum over its pairs."""
    return lambda group: float(sum(matrix[i][j] for i, j in combinations(group, 2)))


def best_partitions(cost, heads):
    """For n = 1 … heads, the partition of the heads into n groups of least cost: a list of (cost, groups).

    Exact by dynamic programming over subsets up to 9 heads; beyond, merges, splits, moves and swaps of single heads as long
    as one helps (`many_heads.py`).
    """
    cost = lru_cache(maxsize=None)(cost)
    return enumerated(cost, heads) if heads <= EXACT_HEADS else many_partitions(Groups(cost, heads))


def enumerated(cost, heads):
    """The best of all partitions, by dynamic programming over subsets: [(cost, groups)] for n = 1 … heads."""
    full = (1 << heads) - 1
    members = [tuple(h for h in range(heads) if mask >> h & 1) for mask in range(full + 1)]
    price = [0.0] + [cost(group) for group in members[1:]]
    best = [{0: (0.0, ())}]  # best[n][mask]: the least cost of splitting mask into n groups
    for _ in range(heads):
        table = {}
        for mask in range(1, full + 1):
            lowest, rest = mask & -mask, mask & (mask - 1)
            part = rest
            while True:  # every subset of mask that holds its lowest head
                group, remainder = part | lowest, mask ^ part ^ lowest
                if remainder in best[-1]:
                    total = price[group] + best[-1][remainder][0]
                    if mask not in table or total < table[mask][0]:
                        table[mask] = (total, (*best[-1][remainder][1], members[group]))
                if part == 0:
                    break
                part = (part - 1) & rest
        best.append(table)
    found = [best[n][full] for n in range(1, heads + 1)]
    return [(total, sorted(map(list, groups))) for total, groups in found]


def pair_costs(energies, layers):
    """The share of a layer's energy that two heads lose by sharing: {"key": {layer: [heads, heads]}, "value": ...}."""
    tables = {"key": {}, "value": {}}
    for layer in layers:
        heads = len(energies[layer].query_weight)
        for kind, cost in zip(tables, energies[layer].costs()):
            tables[kind][layer] = pair_table(cost, heads)
    return tables


def cheapest_pair(table):
    """The two heads with the least entry in a table of `pair_costs`, or none where there is one head."""
    return min(combinations(range(len(table)), 2), key=lambda pair: table[pair], default=())


def group_heads(model, blocks, method="spectral", energies=None):
    """For each layer and kind, the best partition into n = 1 … heads groups: [layer][kind][n − 1] = (cost, groups).

    Costs are relative: the share lost of the energy of all heads of that layer and kind.
    """
    check_method(method)
    energies = (energies or head_energies(model, blocks)) if method == "spectral" else None
    layers = tqdm(each_layer(model), "grouping", len(model.model.layers), leave=False)
    return [layer_partitions(layer.self_attn, energies[index] if energies else None) for index, layer in layers]


def layer_partitions(attention, energies=None):
    """`group_heads` for one layer: [kind][n − 1] = (cost, groups), judged by mean pooling if there are no `energies`."""
    heads = attention.k_proj.out_features // attention.head_dim
    key_cost, value_cost = energies.costs() if energies else mean_cost(attention)
    if energies and heads > EXACT_HEADS:
        return [best_partitions(key_cost, heads), many_partitions(ValueGroups(energies))]
    return [best_partitions(cost, heads) for cost in (key_cost, value_cost)]


def plan_of_counts(partitions, counts):
    """The `HeadPlan` that keeps counts[layer] = (key heads, value heads), in the best groups."""
    key, value = ([layer[kind][count[kind] - 1][1] for layer, count in zip(partitions, counts)] for kind in range(2))
    return HeadPlan(key, value)


def partition_costs(partitions):
    """[layers, 2, heads]: the relative cost of keeping n = 1 … heads key (value) heads, never rising with n."""
    return monotone(torch.tensor([[[cost for cost, _ in kind] for kind in layer] for layer in partitions]))


def monotone(prices):
    """No price rises with the number of heads, and all heads cost nothing: measured noise would break both."""
    prices = prices.clone()
    prices[..., -1] = 0
    return never_rising(prices)


def never_rising(prices):
    """Along the last dimension, each at least the largest of those behind it."""
    return prices.flip(-1).cummax(-1).values.flip(-1) if prices.shape[-1] else prices
