"""How the head budget is shared among layers, and between keys and values: uniformly, by cost, or by measured loss."""

import json
import logging
import math
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache

import numpy as np
import torch

from ..measure.energies import head_energies
from ..measure.perplexity import interval, stream_losses
from ..measure.stream import after_layer, attention_backend, each_block, each_layer, first_stream
from ..runs import fingerprint, write_whole
from ..sources.precision import dtype_name, served_dtype
from ..sources.text import repeating
from .head_plan import neighbours_plan
from .partition import group_heads, partition_costs, plan_of_counts
from .prices import after_refit, loss_increase, shared_in_place

log = logging.getLogger(__name__)


ALLOCATIONS = ("uniform", "cost", "loss", "refit")


def plan_heads(
    model,
    blocks,
    budget=None,
    method="spectral",
    allocation="refit",
    energies=None,
    *,
    cache_bytes=None,
    max_increase=None,
):
    """The `HeadPlan` for one target: groups of least cost in every layer, and the number of heads that each layer is worth.

    `blocks` [blocks, length]: calibration tokens. The target is one of `budget`, key and value heads to keep, as a share of
    the source's; `cache_bytes`, the most bytes of KV cache a token, in the dtype of the checkpoint (`served_dtype`);
    `max_increase`, the largest acceptable increase of the perplexity before refit and training, 0.05 for 5 %
    (`heads_for_increase`): every second block measures it, and nothing else sees those blocks.
    `method` ("mean" or "spectral") says by which fusion groups are judged. `allocation`: "uniform", the same counts in
    every layer; "cost", least sum of relative costs; "loss", least sum of increases of the loss (`loss_increase`);
    "refit", least sum of the part of them that a refit leaves (`after_refit`). All but the first are solved exactly
    (`knapsack`).

    Raises ValueError as `target_heads` does, or if a name is unknown.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"there is no allocation {allocation!r}: choose one of {', '.join(ALLOCATIONS)}")

    held_out = None
    if max_increase is not None:
        (blocks, held_out), energies = fitted_and_measured(blocks), None

    @cache
    def partitions():
        return group_heads(model, blocks, method, energies)

    @cache
    def prices():
        if allocation == "cost":
            return partition_costs(partitions())
        increases = loss_increase(model, blocks, method)
        return after_refit(increases) if allocation == "refit" else increases

    def counts(heads):
        return uniform_counts(model.config, heads) if allocation == "uniform" else knapsack(prices(), heads)

    heads = target_heads(model, blocks, counts, budget, cache_bytes, max_increase, method, held_out)
    return plan_of_counts(partitions(), counts(heads))


def fitted_and_measured(blocks):
    """(the calibration blocks that make a plan, those of running text that measure what it costs), for `max_increase`.

    Raises ValueError if there are too few.
    """
    if len(blocks) < 4:
        raise ValueError(f"an increase needs at least 4 calibration blocks, half of them to measure it, not {len(blocks)}")
    fitted, measured = blocks[0::2], blocks[1::2]
    measured = measured[~repeating(measured)]
    if not len(measured):
        raise ValueError("an increase is measured on running text, but all calibration blocks for it repeat themselves")
    return fitted, measured


def target_heads(model, blocks, counts, budget=None, cache_bytes=None, max_increase=None, method="spectral", held_out=None):
    """The number of key and value heads, over all layers, for the one target that is not None (`plan_heads`).

    `counts`: gives [layers, 2] for a number of heads; only `max_increase` asks for it, and for blocks `held_out`, on which
    it measures.

    Raises ValueError if there is not one target, or it asks for less than one key and one value head a layer or for more
    than there are.
    """
    if sum(target is not None for target in (budget, cache_bytes, max_increase)) != 1:
        raise ValueError("give one of budget, cache_bytes and max_increase, to say how many heads to keep")
    if max_increase is not None:
        return heads_for_increase(model, blocks, held_out, max_increase, counts, method)
    return heads_for_budget(model.config, budget if cache_bytes is None else budget_for_cache(model, cache_bytes))


def budget_for_cache(model, cache_bytes):
    """The largest budget whose KV cache takes at most `cache_bytes` a token, in `served_dtype(model)`; at most 1."""
    config, dtype = model.config, served_dtype(model)
    head_bytes = config.head_dim * dtype.itemsize
    least = 2 * config.num_hidden_layers
    if cache_bytes < least * head_bytes:
        raise ValueError(
            f"a cache of {cache_bytes} bytes a token is too small: one key head and one value head in each of "
            f"{config.num_hidden_layers} layers take {least * head_bytes} in {dtype_name(dtype)}"
        )
    return min(1.0, cache_bytes // head_bytes / (least * config.num_key_value_heads))


@torch.no_grad()
def heads_for_increase(model, blocks, held_out, max_increase, counts, method="spectral", partitions=None, memory=None):
    """The fewest heads with which the perplexity rises by at most the share `max_increase`, as fused.

    `counts`: gives [layers, 2] for a number of heads, by prices that have not seen `held_out`. `blocks` make the groups and
    the fusion, `held_out` measure the increase; the number of heads is bisected, as if more heads never were worse. The
    result is logged, with the 95 % interval of the increase over the measuring blocks. A refit lowers it further: with one
    the budget found is on the safe side. `memory`: a JSON file of the losses measured so far, for a search that was killed.

    Raises ValueError if `max_increase` is not above 0, or there is nothing to measure on.
    """
    if not max_increase > 0:
        raise ValueError(f"the largest acceptable increase of the perplexity is a share above 0, not {max_increase}")
    if held_out is None or not len(held_out):
        raise ValueError("an increase of the perplexity is measured on blocks of its own: give more calibration text")
    known = json.loads(memory.read_text()) if memory and memory.is_file() else {}

    @cache
    def energies():
        return head_energies(model, blocks) if method == "spectral" else None

    @cache
    def groups():
        return partitions or group_heads(model, blocks, method, energies())

    def losses(heads=None):
        plan = plan_of_counts(groups(), counts(heads)) if heads else None
        name = fingerprint(plan and asdict(plan))
        if name not in known:
            known[name] = shared_losses(model, held_out, plan, energies() if plan else None).tolist()
            if memory:
                write_whole(memory, json.dumps(known))
        return torch.tensor(known[name])

    too_few = 2 * model.config.num_hidden_layers - 1
    enough = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
    found = torch.zeros(len(held_out))
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if (measured := losses(middle) - losses()).mean() <= math.log1p(max_increase):
            enough, found = middle, measured
        else:
            too_few = middle
    log.info(
        "%d heads: the perplexity rises by %.1f %% (95 %% interval %.1f to %.1f) on %d blocks held out",
        *(enough, *(100 * math.expm1(value) for value in interval(found)), len(held_out)),
    )
    return enough


def shared_losses(model, blocks, plan=None, energies=None):
    """LM loss of each block, nats per token, of the source, or if its heads are shared by `plan`: no model is built."""
    stream, rope_cos_sin = first_stream(model, blocks)
    with attention_backend("sdpa", model):
        for index, layer in each_layer(model):
            groups = (plan.key_groups[index], plan.value_groups[index]) if plan else None
            energy = energies[index] if energies else None
            with shared_in_place(model.config, layer, *groups, energy) if plan else nullcontext():
                stream = each_block(after_layer, layer, stream, rope_cos_sin)
    return stream_losses(model, stream, blocks).mean(1)


def heads_for_budget(config, budget):
    """The number of key and value heads, over all layers, that `budget` comes to (rounded to the nearest)."""
    if not 0 < budget <= 1:
        raise ValueError(f"a head budget is a share of the source's heads, above 0 and at most 1, not {budget}")
    source = 2 * config.num_hidden_layers * config.num_key_value_heads
    heads = round(budget * source)
    if heads < 2 * config.num_hidden_layers:
        raise ValueError(
            f"a budget of {budget} is {heads} of {source} heads, but {config.num_hidden_layers} layers need one key and "
            f"one value head each: the smallest budget for this model is {least_budget(config):.4f}"
        )
    return heads


def least_budget(config):
    """One key head and one value head per layer."""
    return 1 / config.num_key_value_heads


def uniform_counts(config, heads):
    """[layers, 2]: the same counts everywhere as far as `heads` divides, the rest to keys first, from the first layer."""
    slots = 2 * config.num_hidden_layers
    counts = np.full(slots, heads // slots)
    counts[: heads % slots] += 1
    return counts.reshape(2, -1).T.tolist()


def uniform_plan(config, heads):
    """GQA's way: `heads` key and value heads in all, as `uniform_counts` spreads them, in contiguous groups."""
    return neighbours_plan(config, uniform_counts(config, heads))


def knapsack(prices, heads):
    """Counts [layers, 2] of at least one head each, `heads` in all, with the least sum of `prices` [layers, 2, n].

    Exact, by dynamic programming over the layers: the least price of every total so far.

    Raises ValueError if no counts add up to `heads`.
    """
    items = np.asarray(prices, dtype=float).reshape(-1, np.shape(prices)[-1])
    check_total(heads, items)
    best, choices = np.zeros(1), []
    for price in items:
        totals = np.full((len(price), len(best) + len(price)), np.inf)  # row n - 1: this place keeps n heads
        for n in range(1, len(price) + 1):
            totals[n - 1, n : n + len(best)] = best + price[n - 1]
        choices.append(totals.argmin(0) + 1)
        best = totals.min(0)
    counts = []
    for choice in reversed(choices):
        counts.append(int(choice[heads]))
        heads -= counts[-1]
    return np.reshape(counts[::-1], (-1, 2)).tolist()


def check_total(heads, items):
    """`items` [places, n]: every place takes 1 to n heads."""
    if not len(items) <= heads <= items.size:
        raise ValueError(f"{heads} heads cannot be shared among {len(items)} places of 1 to {items.shape[1]} heads")
