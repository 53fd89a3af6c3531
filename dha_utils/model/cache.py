"""A static KV cache whose layers keep different numbers of key and value heads."""

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer


class DhaStaticLayer(StaticLayer):
    """transformers' `StaticLayer` gives the values as many heads as the keys; here they have their own number."""

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        if value_states.shape[1] != key_states.shape[1]:
            self.values = self.values.new_zeros(len(self.values), value_states.shape[1], *self.values.shape[2:])
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.values)  # as the keys: a compiled step writes into it


class DhaStaticCache(StaticCache):
    """A `StaticCache` for DHA models: `StaticCache(config, max_cache_len)` with layers of their own head counts."""

    def __init__(self, config, max_cache_len, **kwargs):
        super().__init__(config, max_cache_len, **kwargs)
        self.layers = own_layers(self.layers)


def own_layers(layers):
    return [DhaStaticLayer(layer.max_cache_len) for layer in layers]
