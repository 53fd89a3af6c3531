"""How a converted model behaves beside its source: token by token, head by head, and in the text that it writes.

Equal averages hide changed answers, so what is compared are predictions, not only losses.
"""

import random
from functools import partial

import numpy as np
import pandas as pd
import torch

from ..measure.perplexity import interval, log_probabilities, true_losses

MOST = 4  # blocks of a document: a long one must not be all that is looked at


def document_blocks(tokenizer, documents, length, limit):
    """(blocks [n, length], document of each block [n]): at most `limit` documents, `MOST` blocks from the start of each.

    The documents are drawn, always the same; those shorter than a block are passed over. Raises ValueError if fewer than
    two are long enough: they have no spread.
    """
    chosen = []
    for text in random.Random(0).sample(documents, len(documents)):
        tokens = torch.tensor(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0], dtype=torch.long)
        if len(tokens) >= length:
            chosen.append(tokens[: len(tokens) // length * length].view(-1, length)[:MOST])
        if len(chosen) == limit:
            break
    if len(chosen) < 2:
        raise ValueError(
            f"{len(chosen)} of the documents have {length} tokens: give more or longer ones, or shorter blocks"
        )
    return torch.cat(chosen), np.repeat(np.arange(len(chosen)), list(map(len, chosen)))


def predictions(scores, tokens):
    """Of the log-probabilities [n, vocabulary] of the true `tokens` [n]: {column: value of each}."""
    best = scores.max(-1)
    return {
        "loss": true_losses(scores, tokens),  # nats
        "confidence": best.values.exp(),  # probability of the most likely token
        "best": best.indices,
        "right": best.indices == tokens.to(scores.device),  # it is the true one
    }


def token_predictions(model, blocks):
    """`predictions` of every token but the first of each block: one row a token, with its `block` and `position`."""
    tables = [
        token_table(number, predictions(scores, block[1:]))
        for number, (scores, block) in enumerate(zip(log_probabilities(model, blocks), blocks))
    ]
    return pd.concat(tables, ignore_index=True)


def token_drift(source, model, blocks):
    """What two models predict for every token but the first of each block, one row a token.

    Columns: `block`, `position`, `kl` (of the model from the source, nats), `agree` (same most likely token), and the
    columns of `token_predictions` for each of the two, those of the source with `source_` before them.
    """
    tables = []
    pairs = zip(log_probabilities(source, blocks), log_probabilities(model, blocks))
    for number, ((expected, given), block) in enumerate(zip(pairs, blocks)):
        given = given.to(expected.device)
        columns = {f"source_{name}": values for name, values in predictions(expected, block[1:]).items()}
        columns |= predictions(given, block[1:]) | {"kl": (expected.exp() * (expected - given)).sum(-1)}
        tables.append(token_table(number, columns | {"agree": columns["source_best"] == columns["best"]}))
    return pd.concat(tables, ignore_index=True)


def token_table(number, columns):
    """One row a token of the block of that `number`, `position` 1 and up."""
    table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
    return table.assign(block=number, position=np.arange(1, len(table) + 1))


def by_document(tokens, documents):
    """Means of `token_drift` over each document, and `increase`, the loss over the source's (nats): one row a document."""
    means = (
        tokens.drop(columns=["block", "position", "best", "source_best"], errors="ignore")
        .astype(float)
        .groupby(documents[tokens["block"]])
        .mean()
    )
    return means.assign(increase=means["loss"] - means["source_loss"])


def summary(documents):
    """Mean of each column of `by_document` over the documents, with its 95 % interval: columns `mean`, `low`, `high`."""
    return documents.apply(lambda column: pd.Series(interval(column), ["mean", "low", "high"])).T


def calibration_error(confidence, right, bins=10):
    """Expected calibration error (Naeini et al. 2015): mean distance of confidence and accuracy, over equal bins of it."""
    table = pd.DataFrame({"confidence": np.asarray(confidence, float), "right": np.asarray(right, float)})
    groups = table.groupby(np.minimum((table["confidence"] * bins).astype(int), bins - 1))
    return float((groups.mean().diff(axis=1)["right"].abs() * groups.size()).sum() / len(table))


@torch.no_grad()
def head_shares(model, blocks):
    """The share of each query head in what the attention of its layer adds, by mean square: [layers, heads]."""
    layers, heads = model.model.layers, model.config.num_attention_heads
    energy = torch.zeros(len(layers), heads)

    def listen(index, module, inputs):
        mixed = inputs[0].unflatten(-1, (heads, -1)).float()
        weight = module.weight.float().unflatten(-1, (heads, -1))  # [hidden, heads, d]
        for head in range(heads):
            energy[index, head] += (mixed[:, :, head] @ weight[:, head].T).square().sum().cpu()

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(partial(listen, index)) for index, layer in enumerate(layers)]
    try:
        for block in blocks:
            model.model(block[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return (energy / energy.sum(1, keepdim=True)).numpy()


def repeated_share(tokens, n=4):
    """The share of the n-grams of `tokens` [length] that have occurred in them before: 1 is a text that goes in circles."""
    grams = list(zip(*(list(tokens)[start:] for start in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def written(model, tokenizer, prompts, new_tokens, seed=None, times=1):
    """What the model writes after each of `prompts`, sampled from `seed` on, or greedily: lists of `new_tokens` tokens.

    `times`: so many texts of each prompt, one after another.
    """
    how = {
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "repetition_penalty": 1.0,
        "num_return_sequences": times,
    }
    how |= {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed or 0)
    continuations = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        output = model.generate(**inputs, **how)
        continuations += output[:, inputs["input_ids"].shape[1] :].tolist()
    return continuations
