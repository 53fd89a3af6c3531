"""Which query heads share a key or value head, as tables to gather and scatter by."""

import torch
from torch import nn


class QueryGroups(nn.Module):
    """Which query heads share a head: `group` [heads] and, padded to the largest group, `members` [groups, size]."""

    def __init__(self, head_map):
        super().__init__()
        self.head_map, self.count = head_map, max(head_map) + 1
        register_tables(self)

    def tables(self):
        members = [[head for head, group in enumerate(self.head_map) if group == g] for g in range(self.count)]
        size = max(map(len, members))
        place = [group * size + members[group].index(head) for head, group in enumerate(self.head_map)]
        padded = [heads + heads[:1] * (size - len(heads)) for heads in members]
        return {name: torch.tensor(t) for name, t in [("group", self.head_map), ("members", padded), ("place", place)]}

    def grouped(self, states):
        """[batch, heads, new, n] -> [batch, groups, size · new, n]"""
        return states[:, self.members].flatten(2, 3)

    def ungroup(self, states, new):
        """[batch, groups, size · new, n] -> [batch, heads, new, n]"""
        return states.unflatten(2, (-1, new)).flatten(1, 2)[:, self.place]


def register_tables(module):
    for name, table in module.tables().items():
        module.register_buffer(name, table, persistent=False)
