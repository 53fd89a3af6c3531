"""How good a model is: perplexity, its spread over blocks, and a sample of its text."""

import numpy as np
import torch
from scipy.stats import ttest_1samp
from torch.nn.functional import nll_loss

from .stream import next_token_scores


def token_losses(model, blocks):
    """LM loss in nats of every token but the first of each block: [blocks, length − 1]."""
    predictions = log_probabilities(model, blocks)
    return torch.stack([true_losses(prediction, block[1:]) for prediction, block in zip(predictions, blocks)])


@torch.no_grad()
def stream_losses(model, stream, blocks, dtype=torch.float32):
    """`token_losses` of `blocks` from the `stream` [blocks, length, hidden] behind the last layer (`next_token_scores`)."""
    scores = next_token_scores(model, stream, dtype)
    return torch.stack([true_losses(score[:-1], block[1:]).cpu() for score, block in zip(scores, blocks)])


def true_losses(prediction, tokens):
    """LM loss in nats of the true `tokens` [n] under their log-probabilities [n, vocabulary]: [n]."""
    return nll_loss(prediction, tokens.to(prediction.device), reduction="none")


@torch.no_grad()
def log_probabilities(model, blocks):
    """Yields, block by block, the log-probabilities of the tokens after the first: [length − 1, vocabulary]."""
    training = model.training
    model.eval()
    try:
        for block in blocks.to(model.device):
            kept = torch.arange(len(block) - 1, device=model.device)
            yield model(input_ids=block[None], use_cache=False, logits_to_keep=kept).logits[0].float().log_softmax(-1)
    finally:
        model.train(training)


def perplexity(model, blocks):
    """exp of the mean LM loss over `blocks` [blocks, length], each block on its own: `scored_tokens(blocks)` of them."""
    return token_losses(model, blocks).mean().exp().item()


def interval(values, confidence=0.95):
    """(mean, low, high): Student's interval of the mean over seeds, or blocks; (mean, -inf, inf) of a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), -np.inf, np.inf
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), float(values[0])
    low, high = ttest_1samp(values, 0).confidence_interval(confidence)
    return float(values.mean()), float(low), float(high)


def scored_tokens(blocks):
    """How many tokens a perplexity over `blocks` is the mean of: all but the first of each block."""
    return blocks[:, 1:].numel()


@torch.no_grad()
def sample_text(model, tokenizer, prompt, new_tokens=40):
    """`prompt` and its continuation by the model, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)
