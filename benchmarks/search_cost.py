"""Seconds and peak memory of the search for groups in one layer, for every number of heads kept, keys and values.

    python benchmarks/search_cost.py --heads 8 9 12 16 32 64

The energies are made up, after those of real heads: clusters of heads that share a part of their directions, spectra that
fall as a power, heads of unequal size. Every case runs in a process of its own; its memory is that process's peak, by
the operating system, everything included. Up to 12 heads the exact search runs as well, and the fast one's cost stands over
its optimum: the worst and the mean ratio over the numbers of heads kept. (The library is exact up to 9 heads.)
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dha_utils.measure.energies import HeadEnergies
from dha_utils.plan.many_heads import Groups, ValueGroups, many_partitions
from dha_utils.plan.partition import enumerated
from dha_utils.runs import append_rows, has_row, peak_gib

HERE = Path(__file__).parent


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", type=int, default=[8, 9, 12, 16, 32, 64])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "search_cost.csv")
    return parser.parse_args()


def clustered_energies(heads, d, seed):
    """`HeadEnergies` of heads of which about three in eight clusters share a part of their directions."""
    random = torch.Generator().manual_seed(seed)
    clusters = heads * 3 // 8
    member = torch.randint(clusters, (heads,), generator=random)
    own = torch.rand(heads, 1, 1, generator=random) * 0.8 + 0.1  # the share that a head has for itself
    size = (0.4 * torch.randn(heads, 1, 1, generator=random)).exp()
    spectrum = torch.arange(1.0, d + 1) ** -1.0

    def directions(count):
        turns = torch.linalg.qr(torch.randn(count, d, d, generator=random)).Q
        return turns * spectrum @ torch.randn(count, d, heads * d // 2, generator=random) / (heads * d / 2) ** 0.5

    values = (size * ((1 - own).sqrt() * directions(clusters)[member] + own.sqrt() * directions(heads))).flatten(0, 1)
    planes = (torch.randn(1, d // 2, 1, generator=random) + 0.8 * torch.randn(heads, d // 2, 1, generator=random)).exp()
    centre, alone = (torch.randn(n, d // 2, 24, 2, generator=random) for n in (clusters, heads))
    phase = torch.view_as_complex(torch.randn(heads, d // 2, 1, 2, generator=random))
    shared = phase * torch.view_as_complex(centre)[member]
    keys = ((1 - own).sqrt() * shared + own.sqrt() * torch.view_as_complex(alone)) * planes
    return HeadEnergies(
        torch.ones(heads, d // 2, dtype=torch.float64),
        torch.einsum("hpn,kpn->phk", keys.conj(), keys).to(torch.complex128),
        (values @ values.T).double(),
        torch.eye(d, dtype=torch.float64).repeat(heads, 1, 1),
    )


def measured(heads, d, seed):
    """One row per kind of heads and search."""
    energies = clustered_energies(heads, d, seed)
    rows = []
    key_cost, value_cost = energies.costs()
    ways = {
        ("key", "fast"): lambda: many_partitions(Groups(key_cost, heads)),
        ("value", "fast"): lambda: many_partitions(ValueGroups(energies)),
    }
    if heads <= 12:
        ways["key", "exact"] = lambda: enumerated(key_cost, heads)
        ways["value", "exact"] = lambda: enumerated(value_cost, heads)
    found = {}
    for (kind, way), search in ways.items():
        begin = time.perf_counter()
        found[kind, way] = [cost for cost, _ in search()][:-1]
        row = {"heads": heads, "head_dim": d, "seed": seed, "threads": torch.get_num_threads(), "kind": kind, "search": way}
        row["seconds"] = time.perf_counter() - begin
        row["peak_gib"] = peak_gib()
        rows.append(row)
    for row in rows:
        if (exact := found.get((row["kind"], "exact"))) and row["search"] == "fast":
            ratios = np.array(found[row["kind"], "fast"]) / np.array(exact)
            row |= {"worst_ratio": ratios.max(), "mean_ratio": ratios.mean()}
    return rows


def main():
    arguments = parse_arguments()
    for heads in tqdm(arguments.heads, "heads"):
        for seed in arguments.seeds:
            if has_row(arguments.out, {"heads": heads, "head_dim": arguments.head_dim, "seed": seed}):
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                append_rows(arguments.out, process.submit(measured, heads, arguments.head_dim, seed).result())


if __name__ == "__main__":
    main()
