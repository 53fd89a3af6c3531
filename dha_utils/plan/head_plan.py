"""Which heads share one: the `HeadPlan`, one file for a whole model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runs import write_whole


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
        """Key-value heads per layer of the source."""
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
        """Raises ValueError if there is no plan in that file."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"there is no head plan in {path} ({type(error).__name__}): HeadPlan.save writes one"
            ) from error


def show_groups(groups):
    """Groups as text: heads of a group joined by "+"."""
    return "  ".join("+".join(map(str, group)) for group in groups)


def neighbours_plan(config, counts):
    """Contiguous groups of nearly equal size, counts[layer] = (key heads, value heads) of them."""
    plans = [HeadPlan.uniform(config, *count) for count in counts]
    return HeadPlan([plan.key_groups[0] for plan in plans], [plan.value_groups[0] for plan in plans])
