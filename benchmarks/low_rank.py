"""The road DHA competes with: low-rank compression of the cache, measured the same way, without training.

Per layer, keys (before RoPE) and values are rebuilt from one cached vector of rank r: [K; V] = B A x, with A and B the
truncated SVD of the stacked projections, whitened by the second moment of x, so that the error of K and V on calibration
text is least. The cache holds r numbers a token instead of 2 · heads · head_dim. Values need not be rebuilt when one token
is decoded: the attention weights meet the cache first. Keys must be, for the whole context and at every step, because
RoPE stands between the cache and the scores.
"""

import copy

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from dha_utils.measure.energies import matrix_sqrt
from dha_utils.measure.moments import set_rows, with_bias
from dha_utils.model.dha import turned


class LowRankAttention(LlamaAttention):
    """The attention of a LLaMA whose keys and values are linear in `rank` numbers a token, which is what it caches.

    Decodes without padding: position = place in the cache.
    """

    def __init__(self, config, layer_idx, rank, bias=False):
        super().__init__(config, layer_idx)
        width = self.k_proj.out_features
        self.down = nn.Linear(config.hidden_size, rank, bias=bias)
        self.key_up, self.value_up = (nn.Linear(rank, width, bias=False) for _ in range(2))
        self.rotary_emb, self.turns = LlamaRotaryEmbedding(config), None
        del self.k_proj, self.v_proj

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        cache, shape = past_key_values if cache is None else cache, (*hidden_states.shape[:-1], -1, self.head_dim)
        query, latent = self.q_proj(hidden_states).view(shape).transpose(1, 2), self.down(hidden_states)
        query = turned(query, *(turn[:, None] for turn in position_embeddings))
        if cache is not None:
            latent = cache.update(latent[:, None], latent[:, None, :, :0], self.layer_idx)[0][:, 0]
        if query.shape[2] == 1 and latent.shape[1] > 1:
            output = self.decode(query, latent)
        else:
            value = self.value_up(latent).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            output = sdpa_attention_forward(self, query, self.keys(latent), value, attention_mask, scaling=self.scaling)[0]
        return self.o_proj(output.flatten(2)), None

    def keys(self, latent):
        """Every key of the context, turned: [batch, length, rank] -> [batch, heads, length, d]."""
        length = latent.shape[1]
        if self.turns is None or self.turns[0].shape[1] < length:  # kept, so that a step need not make them
            positions = torch.arange(2 ** (length - 1).bit_length(), device=latent.device)[None]
            self.turns = self.rotary_emb(latent, positions)
        key = self.key_up(latent).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return turned(key, *(turn[:, None, :length].to(key) for turn in self.turns))

    def decode(self, query, latent):
        """One new token [batch, heads, 1, d] over the cache [batch, length, rank]: [batch, 1, heads, d]."""
        key = self.keys(latent)
        grouped = query.view(len(query), key.shape[1], -1, self.head_dim)
        weights = (grouped @ key.mT * self.scaling).softmax(-1)
        mixed = weights.flatten(1, 2) @ latent  # [batch, heads, rank]
        up = self.value_up.weight.view(key.shape[1], self.head_dim, -1)
        output = mixed.view(len(query), key.shape[1], -1, latent.shape[-1]) @ up.mT
        return output.flatten(1, 2)[:, None]


@torch.no_grad()
def whitened_svd(model, moments):
    """Per layer, U, S of the stacked, whitened projections: [W_K; W_V] C^½ = U S Vᵀ, C from `collect_moments`."""
    layers = []
    for layer, its_moments in zip(model.model.layers, moments):
        rows = torch.cat([with_bias(layer.self_attn.k_proj), with_bias(layer.self_attn.v_proj)]).double()
        layers.append(torch.linalg.svd(rows @ matrix_sqrt(its_moments.plain.double()), full_matrices=False)[:2])
    return layers


def uniform_ranks(model, budget):
    """The same rank in every layer."""
    config = model.config
    return [round(budget * 2 * config.num_key_value_heads * config.head_dim)] * config.num_hidden_layers


def allocated_ranks(layers, ranks):
    """As many ranks in all, to the largest shares of their layer's energy: the least sum of relative errors."""
    shares = torch.stack([s.square() / s.square().sum() for _, s in layers])
    kept = torch.zeros(shares.numel(), dtype=torch.bool)
    kept[shares.flatten().topk(sum(ranks)).indices] = True
    return kept.view_as(shares).sum(1).clamp(min=1).tolist()


@torch.no_grad()
def low_rank_model(model, layers, ranks):
    """A copy of `model` whose layers cache as many numbers a token as `ranks` says; `layers`: of `whitened_svd`."""
    model = copy.deepcopy(model)
    for index, (layer, (u, _), rank) in enumerate(zip(model.model.layers, layers, ranks)):
        source, u = layer.self_attn, u[:, :rank]
        down = u.T @ torch.cat([with_bias(source.k_proj), with_bias(source.v_proj)]).double()
        scale = down.norm(dim=1).sqrt()  # both sides of equal norms, so that a fit moves both
        bias = source.k_proj.bias is not None
        layer.self_attn = LowRankAttention(model.config, index, u.shape[1], bias).to(source.q_proj.weight)
        layer.self_attn.q_proj, layer.self_attn.o_proj = source.q_proj, source.o_proj
        layer.self_attn.rotary_emb = model.model.rotary_emb  # .to would have rounded its frequencies
        set_rows(layer.self_attn.down, down / scale[:, None])
        for up, part in zip((layer.self_attn.key_up, layer.self_attn.value_up), (u * scale).chunk(2)):
            up.weight.copy_(part)
    return model
