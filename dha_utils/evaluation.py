"""How good and how large a model is: perplexity, cache bytes, speed of `generate`."""

import time

import torch
from torch.nn.functional import cross_entropy


@torch.no_grad()
def token_losses(model, blocks, first_layer=0, hidden_states=None):
    """LM loss in nats of every token but the first of each block: [blocks, length − 1].

    With `hidden_states` [blocks, length, hidden], what enters layer `first_layer`, the model runs from there on.
    """
    layers = model.model.layers
    model.model.layers = layers[first_layer:]
    losses = []
    try:
        for index, block in enumerate(blocks.to(model.device)):
            inputs = {"input_ids": block[None]} if hidden_states is None else {"inputs_embeds": hidden_states[[index]]}
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            losses.append(cross_entropy(logits.float(), block[1:], reduction="none"))
    finally:
        model.model.layers = layers
    return torch.stack(losses)


def perplexity(model, blocks):
    """exp of the mean LM loss over `blocks` [blocks, length], each block on its own: `scored_tokens(blocks)` of them."""
    return token_losses(model, blocks).mean().exp().item()


def scored_tokens(blocks):
    """How many tokens a perplexity over `blocks` is the mean of: all but the first of each block."""
    return blocks[:, 1:].numel()


@torch.no_grad()
def cache_bytes(model, length, batch_size=1):
    """Bytes that the KV cache really holds after `length` tokens of `batch_size` sequences, counted on its tensors."""
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device=model.device)
    cache = model.model(tokens, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


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


@torch.no_grad()
def sample_text(model, tokenizer, prompt, new_tokens=40):
    """`prompt` and what the model writes after it, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)
