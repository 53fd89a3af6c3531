"""How fast a model decodes: `generate` over a cache that is full already, models in turn."""

import time

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

# Of a cache in a step of `generate`: read, and by a `DynamicCache` written anew for what it appends, from a read
CACHE_MOVES = 3


def random_cache(model, batch_size, context):
    """A `DynamicCache` with random numbers for `context` tokens; each layer has the shape that the model fills it in."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(torch.zeros(batch_size, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            setattr(
                layer,
                name,
                torch.randn(*states.shape[:2], context, states.shape[3], dtype=states.dtype, device=states.device),
            )
    return cache


def generate_step(model, cache, new_tokens):
    """A function that generates `new_tokens` for each sequence of `cache`, each time over the same context."""
    batch_size, _, context, _ = cache.layers[0].keys.shape
    tokens = torch.zeros(batch_size, context + 1, dtype=torch.long, device=model.device)
    how = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, "past_key_values": cache}

    def step():
        cache.crop(context - cache.get_seq_length())
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)

    return step


def seconds_in_turn(steps, device, repeats):
    """Seconds of each of `steps` ({name: function}), in turn: [repeats, steps]. The first turn is not counted.

    Each turn has an order of its own, since a step finds in the processor's caches what the one before it left.
    """
    turns, made, random = np.zeros((repeats + 1, len(steps))), list(steps.values()), np.random.default_rng(0)
    for turn in turns:
        for i in random.permutation(len(made)):
            start = time.perf_counter()
            made[i]()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            turn[i] = time.perf_counter() - start
    return turns[1:]


@torch.no_grad()
def decoding_speed(models, context, batch_size=1, new_tokens=4, repeats=5):
    """Tokens a second, all sequences together, that `generate` adds to `context` cached ones: one row a model, quartiles.

    `models`: {name: model}. They take turns in this process. The cache is random: what it holds does not change the time.
    """
    steps = {
        name: generate_step(model, random_cache(model, batch_size, context), new_tokens) for name, model in models.items()
    }
    seconds = seconds_in_turn(steps, next(iter(models.values())).device, repeats)
    quartiles = np.quantile(new_tokens * batch_size / seconds, [0.25, 0.5, 0.75], axis=0).T
    return pd.DataFrame(quartiles, list(models), ["low", "tokens a second", "high"])
