"""Which query heads share a key or value head, as tables to gather and scatter by."""

import torch
from torch import nn

MANY = 8192  # keys of a head, all sequences together (benchmarks/decode.py: below, starting each product costs more)
# These CPUs have no products of 16-bit numbers (measured: ten times as slow as 32-bit ones); others were not at hand
SLOW_HALVES = torch.backends.cpu.get_cpu_capability() == "AVX2"


class QueryGroups(nn.Module):
    """Which query heads share a head: `group` [heads], and `members` [groups, size], padded to the largest group.

    `sorted` [heads] has the query heads group by group, `rank` [heads] the place of each in it.
    """

    def __init__(self, head_map):
        super().__init__()
        self.head_map, self.count = head_map, max(head_map) + 1
        self.sizes = [head_map.count(group) for group in range(self.count)]
        register_tables(self)

    def tables(self):
        members = [[head for head, group in enumerate(self.head_map) if group == g] for g in range(self.count)]
        size = max(map(len, members))
        place = [group * size + members[group].index(head) for head, group in enumerate(self.head_map)]
        padded = [heads + heads[:1] * (size - len(heads)) for heads in members]
        ordered = sum(members, [])
        rank = [ordered.index(head) for head in range(len(ordered))]
        tables = {"group": self.head_map, "members": padded, "place": place, "sorted": ordered, "rank": rank}
        return {name: torch.tensor(table) for name, table in tables.items()}

    def products(self, query, key):
        """The query heads [batch, heads, new, d] with all keys [batch, groups, length, d]: [batch, heads, new, length].

        One product of all groups, padded. On a CPU, whose kernels are slow for a few rows, with much to read one for each
        group, keys first.
        """
        new = query.shape[2]
        if not slow_halves(key) and (key.device.type != "cpu" or key.shape[0] * key.shape[2] < MANY):
            return self.ungroup(self.grouped(query) @ key.transpose(2, 3), new)
        parts = wide(query[:, self.sorted]).split(self.sizes, 1)
        scores = [wide(key[:, group]) @ part.flatten(1, 2).transpose(1, 2) for group, part in enumerate(parts)]
        return torch.cat([score.transpose(1, 2) for score in scores], 1).unflatten(1, (-1, new))[:, self.rank]

    def mixtures(self, weights, value):
        """The values [batch, groups, length, d] mixed by weights [batch, heads, new, length]: [batch, heads, new, d]."""
        grouped, new = self.grouped(weights), weights.shape[2]
        if not slow_halves(value):
            return self.ungroup(grouped @ value, new)
        mixed = [wide(grouped[:, group]) @ wide(value[:, group]) for group in range(self.count)]
        return self.ungroup(torch.stack(mixed, 1).to(value.dtype), new)

    def grouped(self, states):
        """[batch, heads, new, n] -> [batch, groups, size · new, n]"""
        return states[:, self.members].flatten(2, 3)

    def ungroup(self, states, new):
        """[batch, groups, size · new, n] -> [batch, heads, new, n]"""
        return states.unflatten(2, (-1, new)).flatten(1, 2)[:, self.place]


def slow_halves(states):
    """Whether products of such numbers are slow on this CPU."""
    return SLOW_HALVES and states.device.type == "cpu" and states.dtype.itemsize == 2


def wide(states):
    """16-bit numbers in 32 bits where their products are slow: a head at a time, so that no cache is copied as a whole."""
    return states.float() if slow_halves(states) else states


def register_tables(module):
    for name, table in module.tables().items():
        module.register_buffer(name, table, persistent=False)
