"""The cost of a model: bytes of KV cache."""

import torch
from transformers import DynamicCache

from ..sources.precision import served_dtype

FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
SHAPES = {  # published: arXiv 2307.09288 (LLaMA-2), 2407.21783 (Llama 3), 2502.02737 (SmolLM2)
    name: dict(zip(FIELDS, shape))
    for name, shape in {
        "SmolLM2-135M": (30, 576, 9, 3, 1536, 49152, True),
        "Llama-3.2-1B": (16, 2048, 32, 8, 8192, 128256, True),
        "LLaMA-2-7B": (32, 4096, 32, 32, 11008, 32000, False),
        "LLaMA-2-13B": (40, 5120, 40, 40, 13824, 32000, False),
        "Llama-3-8B": (32, 4096, 32, 8, 14336, 128256, False),
        "Llama-3-70B": (80, 8192, 64, 8, 28672, 128256, False),
    }.items()
}


@torch.no_grad()
def cache_bytes(model, length, batch_size=1, dtype=None):
    """Bytes that the KV cache really holds after `length` tokens of `batch_size` sequences, counted on its tensors.

    In the dtype that the model computes in, or as they would be in `dtype` (`served_dtype`: the checkpoint's own).
    """
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    model.model(tokens, past_key_values=cache, use_cache=True)
    return cached_numbers(cache) * (dtype or model.dtype).itemsize


def cached_numbers(cache):
    """How many numbers a dynamic cache holds."""
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def bytes_per_token(model):
    """Bytes of KV cache a token of one sequence, in the dtype that the model is served in."""
    return cache_bytes(model, 1, dtype=served_dtype(model))


def shape_bytes(shape, itemsize=2):
    """(bytes of the weights, bytes of KV cache a token of one sequence) of a LLaMA of one of the `SHAPES`."""
    width = shape["hidden_size"] // shape["num_attention_heads"]
    kept = 2 * shape["num_key_value_heads"] * width
    layer = shape["hidden_size"] * (2 * shape["num_attention_heads"] * width + kept + 3 * shape["intermediate_size"])
    embeddings = (1 if shape["tie_word_embeddings"] else 2) * shape["vocab_size"] * shape["hidden_size"]  # and the head
    layers = shape["num_hidden_layers"]
    return (layers * layer + embeddings) * itemsize, layers * kept * itemsize


def serving(weights, per_token, context, memory_gb, bandwidth_gb_s, price_per_hour):
    """What one accelerator serves at most, as if decoding took just the time of reading the weights once and every cache.

    `weights`, `per_token`: bytes, as of `shape_bytes`. `requests`: sequences of `context` tokens that fit beside the
    weights; `tokens a second, at most` of all of them together; `price of a million tokens, at least`: computing, and
    reading prompts, come on top.
    """
    cache = context * per_token
    requests = int(max(memory_gb * 1e9 - weights, 0) // cache)
    speed = requests * bandwidth_gb_s * 1e9 / (weights + requests * cache)
    price = price_per_hour / 3600 / speed * 1e6 if requests else float("nan")
    return {"requests": requests, "tokens a second, at most": speed, "price of a million tokens, at least": price}
