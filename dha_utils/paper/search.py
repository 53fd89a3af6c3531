"""The paper's search (DHA §4.3, B.2-B.4): a short training of ω tells which heads belong together, and how many a layer
needs.

Its partitions and `HeadPlan` are those of `plan/`: every plan fits every fusion.
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..fuse.layer import query_heads
from ..plan.allocate import check_total
from ..plan.partition import best_partitions
from ..recover.training import train
from .linear import omega_optimizer, omegas, paper_schedule, with_omega

GROUPINGS = ("annealing", "search")


SCORES = "scores-{:05d}.safetensors"


def search_scores(
    model,
    blocks,
    steps=240,
    tokens_per_step=2048,
    per_dimension=True,
    learning_rate=1e-4,
    omega_learning_rate=1e-2,
    seed=0,
    snapshots=6,
    output_dir="runs/search",
):
    """How far the ω rows of every two query heads are apart while ω trains on the LM loss alone: {step: scores}.

    `scores` is {"key": [layers, H, H], "value": the same} (`omega_scores`); every head may mix all of its layer. Steps
    as in the paper; θ trains along and is thrown away, the model is left as it was. `blocks` [blocks, length].

    `output_dir` gets the scores as safetensors, the log, and checkpoints from which the same call resumes.
    """
    mixed = with_omega(model, per_dimension=per_dimension)
    saver = _SaveScores(steps, snapshots)
    folder = train(
        mixed,
        blocks,
        steps * tokens_per_step,
        optimizer=omega_optimizer(mixed, learning_rate, omega_learning_rate),
        callbacks=[saver],
        tokens_per_step=tokens_per_step,
        seed=seed,
        evaluations=snapshots,
        output_dir=output_dir,
        **paper_schedule(learning_rate),
    )
    return {step: load_file(folder / SCORES.format(step)) for step in range(0, steps + 1, saver.every)}


@torch.no_grad()
def omega_scores(model):
    """Σ_j ‖ω_hj − ω_h'j‖², mean over d, for every two query heads of a layer: {"key": [layers, H, H], "value": same}."""

    def squared_distances(omega):
        rows = omega.flatten(1)
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square() / omega.shape[-1]

    kinds = zip(*omegas(model))
    return {kind: torch.stack([squared_distances(o) for o in layers]) for kind, layers in zip(("key", "value"), kinds)}


class _SaveScores(TrainerCallback):
    def __init__(self, steps, snapshots):
        self.every = max(1, steps // snapshots)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(omega_scores(model), folder / ".scores.partial")
            (folder / ".scores.partial").replace(folder / SCORES.format(state.global_step))


def score_partitions(scores, heads, grouping="annealing", seed=0):
    """For each layer and kind, a partition of the source's `heads` into n = 1 … heads groups of little L_fusion.

    Laid out as `partition.group_heads`: [layer][kind][n − 1] = (cost, groups). `grouping`: "annealing", the paper's, into
    groups of (nearly) equal size; "search", the best of any sizes by `partition.best_partitions`.

    Raises ValueError if the grouping is unknown.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"there is no grouping {grouping!r}: choose one of {', '.join(GROUPINGS)}")
    layers = zip(scores["key"].tolist(), scores["value"].tolist())
    costs = [[fusion_cost(matrix, heads) for matrix in pair] for pair in layers]
    if grouping == "search":
        return [[best_partitions(cost, heads) for cost in pair] for pair in costs]
    return [[[anneal(cost, heads, n, seed) for n in range(1, heads + 1)] for cost in pair] for pair in costs]


def fusion_cost(matrix, heads):
    """L_fusion (Eq. 6-7) of a group of source heads, as a function, from one layer's scores [H, H] of its query heads."""
    matrix = np.asarray(matrix)
    queries = len(matrix) // heads

    def cost(group):
        rows = query_heads(group, queries)
        return float(matrix[np.ix_(rows, rows)].sum() / 2 / len(rows))

    return cost


def anneal(cost, heads, n, seed=0, restarts=20, hottest=100.0, coldest=1e-3, cooling=0.9):
    """Groups of (nearly) equal size by simulated annealing (DHA B.3): (cost, groups) of the best state seen.

    One swap of two heads of different groups an iteration, accepted if it lowers the cost, else with probability
    exp(−rise / temperature); the temperature falls by `cooling` from `hottest` to `coldest`. The paper's listing accepts
    the other way round, which would look for the worst groups. One pass is about 110 iterations, too few for many
    heads: hence the restarts from random groups.
    """
    cost, random = lru_cache(maxsize=None)(cost), np.random.default_rng(seed)
    best = math.inf, None
    for _ in range(restarts if 1 < n < heads else 1):
        groups = [tuple(sorted(part.tolist())) for part in np.array_split(random.permutation(heads), n)]
        total, temperature = sum(map(cost, groups)), hottest
        best = min(best, (total, sorted(map(list, groups))))
        while temperature > coldest and 1 < n < heads:
            i, j = random.choice(n, 2, replace=False)
            a, b = int(random.choice(groups[i])), int(random.choice(groups[j]))
            swapped = [tuple(sorted({*groups[i]} - {a} | {b})), tuple(sorted({*groups[j]} - {b} | {a}))]
            rise = sum(map(cost, swapped)) - cost(groups[i]) - cost(groups[j])
            if rise <= 0 or random.random() < math.exp(-rise / temperature):
                groups[i], groups[j] = swapped
                total += rise
                best = min(best, (total, sorted(map(list, groups))))
            temperature *= cooling
    return best


def greedy(prices, heads):
    """The paper's allocation (DHA B.4), as we read it: counts [layers, 2], `heads` in all, from L_fusion.

    `prices` [layers, 2, n]: L_fusion with n heads. Every place has one head. Then the places, in the order of their
    L_fusion with that one, highest first, are handed half of a layer's heads each (16 of 32) while the budget lasts, the
    next ones a quarter (8), an eighth (4), …; the rest goes round in ones. The paper's text speaks of dynamic
    programming instead: that is `allocate.knapsack`.

    Raises ValueError if no counts add up to `heads`.
    """
    items = np.asarray(prices, dtype=float).reshape(-1, np.shape(prices)[-1])
    check_total(heads, items)
    counts, most = np.ones(len(items), dtype=int), items.shape[1]
    left, chunk = heads - len(items), max(1, most // 2)
    while left:
        for place in np.argsort(-items[:, 0], kind="stable"):
            if left >= chunk and counts[place] + chunk <= most and (counts[place] == 1 or chunk == 1):
                counts[place] += chunk
                left -= chunk
        chunk = max(1, chunk // 2)
    return counts.reshape(-1, 2).tolist()
