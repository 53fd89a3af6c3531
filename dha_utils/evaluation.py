"""How good and how large a model is: perplexity, cache bytes, speed of `generate`."""

import time

import torch
from torch.nn.functional import nll_loss


def token_losses(model, blocks):
    """LM loss in nats of every token but the first of each block: [blocks, length − 1]."""
    predictions = log_probabilities(model, blocks)
    return torch.stack([true_losses(prediction, block) for prediction, block in zip(predictions, blocks)])


def true_losses(prediction, block):
    """LM loss in nats of the tokens of one block [length] under its `log_probabilities`: [length − 1]."""
    return nll_loss(prediction, block[1:].to(prediction.device), reduction="none")


@torch.no_grad()
def log_probabilities(model, blocks, first_layer=0, hidden_states=None):
    """Yields, block by block, the log-probabilities of the tokens after the first: [length − 1, vocabulary].

    With `hidden_states` [blocks, length, hidden], what enters layer `first_layer`, the model runs from there on.
    """
    layers = model.model.layers
    model.model.layers = layers[first_layer:]
    try:
        for index, block in enumerate(blocks.to(model.device)):
            inputs = {"input_ids": block[None]} if hidden_states is None else {"inputs_embeds": hidden_states[[index]]}
            yield model(**inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    finally:
        model.model.layers = layers


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
