"""Which heads share one: the `HeadPlan`, and the search for the groups that lose least.

Costs are functions of a group (a tuple of source heads); the cost of a partition is their sum.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from .runs import write_whole

EXACT_HEADS = 9  # Up to here every partition is looked at: 21,147 of them at 9 heads


@dataclass(frozen=True)
class HeadPlan:
    """Per layer, which of the source's key heads share a key head, and which value heads share a value head.

    `key_groups[layer]` and `value_groups[layer]` are lists of groups, each a list of the source's key-value heads.

    Raises ValueError if a layer's groups do not hold each head exactly once.
    """

    key_groups: list
    value_groups: list

    def __post_init__(self):
        if len(self.key_groups) != len(self.value_groups) or not self.key_groups:
            raise ValueError("a head plan needs key groups and value groups for the same layers")
        for layer, groups in enumerate(self.key_groups + self.value_groups):
            heads = sorted(head for group in groups for head in group)
            if heads != list(range(self.source_heads)) or not all(groups):
                raise ValueError(
                    f"layer {layer % len(self.key_groups)} of the head plan must hold each of the "
                    f"{self.source_heads} source heads exactly once, in groups that are not empty"
                )

    @property
    def source_heads(self):
        """Key-value heads a layer of the source."""
        return sum(map(len, self.key_groups[0]))

    @property
    def key_heads(self):
        return [len(groups) for groups in self.key_groups]

    @property
    def value_heads(self):
        return [len(groups) for groups in self.value_groups]

    @property
    def heads(self):
        """Key and value heads kept in all."""
        return sum(self.key_heads) + sum(self.value_heads)

    @property
    def budget(self):
        """Key and value heads kept, over those of the source: the ratio of the KV caches."""
        return self.heads / (2 * len(self.key_groups) * self.source_heads)

    @classmethod
    def uniform(cls, config, key_heads, value_heads):
        """Contiguous groups of (nearly) equal size, the same in every layer: with key_heads = value_heads, GQA."""
        heads = config.num_key_value_heads
        for kept in (key_heads, value_heads):
            if not 1 <= kept <= heads:
                raise ValueError(f"cannot keep {kept} of {heads} heads a layer: choose 1 to {heads}")
        key, value = ([group.tolist() for group in np.array_split(range(heads), kept)] for kept in (key_heads, value_heads))
        return cls([key] * config.num_hidden_layers, [value] * config.num_hidden_layers)

    def save(self, path):
        write_whole(path, json.dumps({"key_groups": self.key_groups, "value_groups": self.value_groups}))

    @classmethod
    def load(cls, path):
        return cls(**json.loads(Path(path).read_text()))


def show_groups(groups):
    """Groups as text: heads of a group joined by "+"."""
    return "  ".join("+".join(map(str, group)) for group in groups)


def pairwise_cost(matrix):
    """A group's cost from a [heads, heads] matrix of pairwise costs: the sum over its pairs."""
    return lambda group: float(sum(matrix[i][j] for i, j in combinations(group, 2)))


def best_partitions(cost, heads):
    """For n = 1 … heads, the partition of the heads into n groups of least cost: a list of (cost, groups).

    Exact by dynamic programming over subsets up to 9 heads; beyond, merges that cost least, each followed by moves and
    swaps of single heads until none helps.
    """
    cost = lru_cache(maxsize=None)(cost)
    search = _enumerate if heads <= EXACT_HEADS else _agglomerate
    return [(total, sorted(map(list, groups))) for total, groups in search(cost, heads)]


def _enumerate(cost, heads):
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
    return [best[n][full] for n in range(1, heads + 1)]


def _agglomerate(cost, heads):
    groups = [(h,) for h in range(heads)]
    results = []
    while True:
        groups = _improve(cost, groups)
        results.append((sum(map(cost, groups)), tuple(groups)))
        if len(groups) == 1:
            return results[::-1]
        a, b = min(combinations(groups, 2), key=lambda pair: cost(_union(*pair)) - cost(pair[0]) - cost(pair[1]))
        groups = [group for group in groups if group not in (a, b)] + [_union(a, b)]


def _union(a, b):
    return tuple(sorted(a + b))


def _improve(cost, groups):
    """Move one head, or swap two of different groups, as long as the best such step lowers the cost."""
    while True:
        best, step = -1e-12, None
        for a, b in combinations(groups, 2):
            for heads_a in ((), *((h,) for h in a)):
                for heads_b in ((), *((h,) for h in b)):
                    new_a = tuple(sorted(set(a) - set(heads_a) | set(heads_b)))
                    new_b = tuple(sorted(set(b) - set(heads_b) | set(heads_a)))
                    if not new_a or not new_b or (new_a, new_b) == (a, b):
                        continue
                    change = cost(new_a) + cost(new_b) - cost(a) - cost(b)
                    if change < best:
                        best, step = change, (a, b, new_a, new_b)
        if step is None:
            return groups
        a, b, new_a, new_b = step
        groups = [group for group in groups if group not in (a, b)] + [new_a, new_b]
