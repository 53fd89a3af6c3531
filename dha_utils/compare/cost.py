"""The cost of a model: bytes of KV cache, speed of `generate`."""

import time

import torch
from transformers import DynamicCache

from ..sources.precision import served_dtype


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


@torch.no_grad()
def generation_speed(model, prompt_length=256, new_tokens=64, repeats=3):
    """Tokens a second of greedy `generate` for one sequence, prompt included in the time: one figure per repeat."""
    prompt = torch.zeros(1, prompt_length, dtype=torch.long, device=model.device)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    speeds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        speeds.append(new_tokens / (time.perf_counter() - start))
    return speeds
