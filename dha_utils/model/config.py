"""The layout of a Decoupled-Head Attention model (DHA §4.1)."""

from huggingface_hub.dataclasses import strict
from transformers import (
    LlamaConfig,
)


@strict
class DhaConfig(LlamaConfig):
    """`LlamaConfig` with the layout of the shared heads.

    `key_head_map`, `value_head_map`: per layer, for each query head the index of its key (value) head. Absent: one
    head each. `key_frequencies`: per layer and key head, the RoPE frequency (an index below head_dim / 2) that each of
    its head_dim / 2 planes turns with. Absent: the standard order.
    `source_num_key_value_heads`: of the model that it was made from, so that the budget can be told from the config.
    `query_key_norm`: whether queries and keys are normalised before RoPE (Qwen3), each head with weights of its own.
    `num_key_value_heads`, which others size caches by, is the most heads of a kind that a layer caches.
    """

    model_type = "dha"

    key_head_map: list | None = None
    value_head_map: list | None = None
    key_frequencies: list | None = None
    source_num_key_value_heads: int | None = None
    query_key_norm: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        own_head = [list(range(self.num_attention_heads)) for _ in range(self.num_hidden_layers)]
        self.key_head_map = self.key_head_map or own_head
        self.value_head_map = self.value_head_map or own_head
        for name in ("key_head_map", "value_head_map"):
            _check_map(name, getattr(self, name), self.num_hidden_layers, self.num_attention_heads)
        self.source_num_key_value_heads = self.source_num_key_value_heads or self.num_key_value_heads
        self.num_key_value_heads = max(map(max, self.head_counts()))

    def head_counts(self):
        """[(key heads, value heads)] per layer."""
        return [(max(k) + 1, max(v) + 1) for k, v in zip(self.key_head_map, self.value_head_map)]

    @property
    def budget(self):
        """Key and value heads kept, over those of the source: the ratio of the KV caches."""
        kept = sum(keys + values for keys, values in self.head_counts())
        return kept / (2 * self.num_hidden_layers * self.source_num_key_value_heads)


def _check_map(name, layers, num_layers, num_heads):
    if len(layers) != num_layers:
        raise ValueError(f"{name} has {len(layers)} layers, the model {num_layers}: give one list per layer")
    for index, heads in enumerate(layers):
        if len(heads) != num_heads or set(heads) != set(range(max(heads) + 1)):
            raise ValueError(
                f"{name}[{index}] must give each of the {num_heads} query heads a head, numbered from 0 without gaps"
            )
