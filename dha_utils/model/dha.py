"""The Decoupled-Head Attention model: LLaMA with fewer, independently shared key and value heads (DHA §4.1).

    head_h = softmax(q_h · k_{key_head_map[h]}ᵀ / √d) · v_{value_head_map[h]}

A checkpoint saved from here loads through transformers' `Auto*` classes once `dha_utils` is imported.
The parts of transformers used here beyond its public interface are named in tests/model/test_transformers.py.
"""

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward, rotate_half
from transformers.utils import TransformersKwargs

from .cache import DhaStaticLayer, own_layers
from .config import DhaConfig
from .groups import QueryGroups, register_tables

# The arguments of a decoder layer to its attention, beyond the named ones. Any other is refused: 5.24 renamed the cache,
# and a signature that swallows unknown names lost it without an error.
KNOWN_ARGUMENTS = {*TransformersKwargs.__annotations__, "cache_position", "token_type_ids", "use_cache"}
FEW = 64  # new tokens over a cache: up to here no head is copied, beyond computing outweighs copying


class DhaAttention(LlamaAttention):
    """Attention over `n_k` key heads and `n_v` value heads, each with its own map from the query heads."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.num_key_value_groups = 1  # the maps expand, not transformers' repeat_kv
        keys, values = config.head_counts()[layer_idx]
        bias = config.attention_bias
        self.k_proj = nn.Linear(config.hidden_size, keys * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, values * self.head_dim, bias=bias)
        self.key_groups = QueryGroups(config.key_head_map[layer_idx])
        self.value_groups = QueryGroups(config.value_head_map[layer_idx])
        if config.query_key_norm:
            heads, d = config.num_attention_heads, self.head_dim
            self.q_norm, self.k_norm = (HeadRMSNorm(n, d, config.rms_norm_eps) for n in (heads, keys))
            self.query_gauge = nn.Parameter(torch.cat([torch.ones(heads, d // 2), torch.zeros(heads, d // 2)], 1))
        register_tables(self)

    def tables(self):
        """For each dimension of each key head, the column of the cos and sin tables that it turns with: [n_k, d]."""
        frequencies = self.config.key_frequencies
        planes = torch.tensor(frequencies[self.layer_idx]).repeat(1, 2) if frequencies else None
        return {"key_planes": planes}

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        if unknown := kwargs.keys() - KNOWN_ARGUMENTS:
            raise TypeError(f"DHA attention does not know the argument(s) {', '.join(sorted(unknown))}: leave them out")
        cache = past_key_values if cache is None else cache  # transformers 5.23 says the one, 5.24 the other
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.query_key_norm:
            query, key = self._gauge(self.q_norm(query)), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = self._rotate(query, key, *position_embeddings)
        if cache is not None:  # an empty cache is falsy
            self._check_cache(cache)
            key, value = cache.update(key, value, self.layer_idx)
        backend = self.config._attn_implementation
        flat_mask = attention_mask is None or isinstance(attention_mask, torch.Tensor)  # FlexAttention has its own kind
        # without a mask, transformers means the first tokens of a static cache, the last ones of any other
        plain = attention_mask is not None or cache is None or not isinstance(cache.layers[self.layer_idx], StaticLayer)
        few = query.shape[2] == 1 or (plain and query.shape[2] < key.shape[2] and query.shape[2] <= FEW)
        if few and cache is not None and flat_mask and not self.training:
            output, weights = self._decode(query, key, value, attention_mask)
            weights = weights if backend == "eager" else None  # no other backend hands them out
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            key, value = key[:, self.key_groups.group], value[:, self.value_groups.group]
            output, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _gauge(self, query):
        """Behind a norm, a factor for each plane of a query cannot be in its projection: [batch, length, heads, d]."""
        if self.key_planes is not None:  # a query carries the planes of its key head
            place = self.key_planes[self.key_groups.group]
            place = place + place.shape[-1] // 2 * (
                torch.arange(place.shape[-1], device=place.device) >= place.shape[-1] // 2
            )
            query = query.gather(-1, place.expand_as(query))
        real, imaginary = (part.repeat(1, 2) for part in self.query_gauge.chunk(2, -1))
        return turned(query, real, imaginary)

    def _rotate(self, query, key, cos, sin):
        """RoPE, each key head and its queries in the frequencies that the key head carries."""
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        if self.key_planes is None:
            return turned(query, cos, sin), turned(key, cos, sin)
        cos, sin = (table[:, 0, :, self.key_planes].transpose(1, 2) for table in (cos, sin))  # [batch, n_k, length, d]
        key = turned(key, cos, sin)
        cos, sin = cos[:, self.key_groups.group], sin[:, self.key_groups.group]
        return turned(query, cos, sin), key

    def _decode(self, query, key, value, attention_mask):
        """A few new tokens over the cache as it is: grouped matrix products, no head is ever copied.

        query [batch, heads, new, d], key [batch, n_k, length, d], value [batch, n_v, length, d]. attention_mask: None,
        [batch, 1 or heads, new, length], of booleans or to be added, or FlashAttention's [batch, length], 0 where padded.
        Without one of its own for each new token, a token sees those before it.
        """
        new, length = query.shape[2], key.shape[2]
        scores = self.key_groups.products(query * self.scaling, key)
        mask = seen(attention_mask, new, length, query.device)
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask.bool(), lowest)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return self.value_groups.mixtures(weights, value).transpose(1, 2), weights

    def _check_cache(self, cache):
        """Refuses a cache that cannot hold this layer's heads; a `DynamicCache()` has no layers before its first update."""
        if self.layer_idx >= len(cache.layers):
            return
        layer, counts = cache.layers[self.layer_idx], (self.key_groups.count, self.value_groups.count)
        if counts[0] != counts[1] and isinstance(layer, StaticLayer) and not isinstance(layer, DhaStaticLayer):
            raise ValueError(
                f"transformers' StaticCache cannot hold {counts[0]} key heads beside {counts[1]} value heads (layer "
                f"{self.layer_idx}): use dha_utils.model.cache.DhaStaticCache"
            )
        for states, count, kind in zip((layer.keys, layer.values), counts, ("key", "value")):
            if states is not None and states.dim() == 4 and states.shape[1] != count:
                raise ValueError(
                    f"the cache holds {states.shape[1]} {kind} heads in layer {self.layer_idx}, this layer {count}: prefix "
                    "tuning and caches made by hand have one number of heads for all layers, keys and values"
                )


def turned(states, cos, sin):
    """RoPE: each plane of `states` [..., d] turned by its angle (a plane is dimensions p and p + d/2)."""
    return states * cos + rotate_half(states) * sin


def seen(mask, new, length, device=None):
    """What each of the `new` last tokens of `length` sees: booleans, or numbers to be added, [..., new, length]; None: all.

    `mask`: as transformers hands it out, one for each new token, or FlashAttention's [batch, length] of padding, or None.
    Over a static cache, which is longer than what it holds, that of FlashAttention ends with the last new token.
    """
    if mask is None and new == 1:
        return None
    if mask is None or mask.dim() == 2:
        width = length if mask is None else min(mask.shape[-1], length)
        causal = torch.ones(new, length, dtype=torch.bool, device=device).tril(width - new)
        mask = causal if mask is None else causal & pad(mask[:, None, None, -width:].bool(), (0, length - width))
    return mask[..., -length:]


class HeadRMSNorm(nn.Module):
    """RMSNorm over the dimensions of each head [..., heads, d], with weights of its own for each."""

    def __init__(self, heads, head_dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads, head_dim)), eps

    def forward(self, states):
        exact = states.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(states.dtype)


class DhaModel(LlamaModel):
    config: DhaConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = DhaAttention(config, index)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DhaAttention | QueryGroups):  # from_pretrained leaves such buffers unfilled
            register_tables(module)


class DhaForCausalLM(LlamaForCausalLM):
    config: DhaConfig

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)  # not LlamaForCausalLM's own: it would build a LlamaModel
        self.model = DhaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_static_cache(self, *args, **kwargs):
        """For `generate(cache_implementation="static")`."""
        cache = super()._prepare_static_cache(*args, **kwargs)
        cache.layers = own_layers(cache.layers)
        return cache

    def _get_static_cache_init_shape(self):
        return None  # of each layer when it gets its first keys and values

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "continuous batching (generate_batch) has one number of heads for all layers, keys and values: use generate, "
            "or dha_utils.to_llama where the plan allows it"
        )


class DhaPreTrainedModel(LlamaPreTrainedModel):
    config: DhaConfig


class DhaForSequenceClassification(GenericForSequenceClassification, DhaPreTrainedModel):
    pass


class DhaForTokenClassification(GenericForTokenClassification, DhaPreTrainedModel):
    pass


AutoConfig.register("dha", DhaConfig, exist_ok=True)


for auto, model_class in (
    (AutoModel, DhaModel),
    (AutoModelForCausalLM, DhaForCausalLM),
    (AutoModelForSequenceClassification, DhaForSequenceClassification),
    (AutoModelForTokenClassification, DhaForTokenClassification),
):
    auto.register(DhaConfig, model_class, exist_ok=True)
