"""What first duals are worth: how much work they leave to the exact solver, and what they cost a GPU.

    python -m bench.reports.duals          -> bench/results/duals.json, duals.md
    python -m bench.reports.duals --tiny     at one small size, nothing written

A simulation: everything runs on the CPU. What a GPU would do is counted in passes over the n x n cost (a product of the
factors each), what the host does afterwards in refills, bids and searches of the list solver, without any help of its
own: row reduction, then shortest paths, given up after CAP refills a row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.reports.kernels import machine, markdown
from fastmatch.assignment import FactorCost
from fastmatch.assignment.candidate_lists import ListSolve, norm_shift, sampled_spread
from fastmatch_kernels import ops as kernels

RESULTS = Path(__file__).parents[1] / "results"
CAP = 5


def pair(kind, n, seed):
    """Factors whose inner products are to be maximised."""
    g = np.random.default_rng([seed, n])
    name, rank, level = kind
    a = g.standard_normal((n, rank), np.float32)
    if name == "sibling":
        b = (a + level * g.standard_normal(a.shape, np.float32))[g.permutation(n)]
    else:
        b = g.standard_normal(a.shape, np.float32)
        for x in (a, b):
            x *= np.exp(level * g.standard_normal((n, 1))).astype(np.float32)
    return torch.from_numpy(a), torch.from_numpy(b.astype(np.float32))


def label(kind):
    name, rank, level = kind
    extra = {"sibling": f", noise {level}", "gaussian": "", "log-normal": f", spread {level}"}[name]
    return f"{name}, d = {rank}{extra}"


def sinkhorn(a, b, start, spread, last, steps, relaxation):
    """(duals, passes): two products a step."""
    temperatures = (spread * np.geomspace(1, last, steps)).tolist()
    return kernels.sinkhorn_duals([(a, b)], temperatures, v=start, relaxation=relaxation), 2.0 * steps


def auction(a, b, start, spread, scales, most=200.0):
    """(duals, passes): all free rows bid at once, best against second best, the highest bid of a column wins.

    A phase ends when one row in a hundred is free: the last ones' price wars would take most of the rounds.
    """
    n, v, passes = len(a), start.clone(), 0.0
    for scale in scales:
        owner, column = (torch.full((n,), -1) for _ in range(2))
        while passes < most:
            free = (column < 0).nonzero()[:, 0]
            if len(free) <= n // 100:
                break
            item, cost, _ = kernels.row_topk([(a[free], b)], v, 2)
            value = cost - v[item]
            bid, wanted = value[:, 1] - value[:, 0] + scale * spread, item[:, 0]
            highest = torch.zeros(n).scatter_reduce(0, wanted, bid, "amax")
            winner = torch.full((n,), -1).scatter(
                0, wanted[bid >= highest[wanted]], free[bid >= highest[wanted]]
            )
            sold = (winner >= 0).nonzero()[:, 0]
            column[owner[sold][owner[sold] >= 0]] = -1
            owner[sold], column[winner[sold]] = winner[sold], sold
            v[sold] -= highest[sold]
            passes += len(free) / n
    return v, passes


def finish(cost, duals):
    """What the host has left to do from these duals."""
    begin = time.perf_counter()
    work = ListSolve(cost, -1.0, duals.double().numpy())
    work.fill()
    work.reduce()
    free = work.free()
    done = work.augment(CAP * len(duals))
    seconds = time.perf_counter() - begin
    reads, bids, pops, searches = (int(x) for x in work.counts)
    return {
        "free rows": free,
        "refills a row": reads / len(duals) if done else f"> {CAP}",
        "bids a row": bids / len(duals),
        "searches": searches if done else f"> {searches}",
        "columns popped": pops if done else f"> {pops}",
        "finish (s)": seconds if done else f"> {seconds:.1f}",
    }


def starts(a, b, start, spread):
    yield "norm shift", lambda: (start, 0.0)
    for scales in ((0.1,), (0.5, 0.1, 0.02)):
        name = ", ".join(map(str, scales))
        yield f"auction rounds, eps {name}", lambda s=scales: auction(a, b, start, spread, s)
    for last, steps, relaxation in (
        (0.01, 10, 1.0),
        (0.003, 20, 1.0),
        (0.003, 20, 1.8),
        (0.003, 40, 1.0),
        (0.003, 40, 1.8),
    ):
        yield (
            f"Sinkhorn, {steps} steps to {last}" + (f", relaxed {relaxation}" if relaxation != 1 else ""),
            lambda o=(last, steps, relaxation): sinkhorn(a, b, start, spread, *o),
        )  # fmt: skip


def measure(kinds, sizes):
    small = torch.eye(64)
    finish(FactorCost([(small, small)]), torch.zeros(64))  # compiles
    for kind in kinds:
        for n in sizes:
            a, b = pair(kind, n, 1)
            cost = FactorCost([(a, b)])
            spread = sampled_spread(cost)
            start = torch.from_numpy(norm_shift(cost, -1.0)).float()
            for name, make in starts(a, b, start, spread):
                duals, passes = make()
                yield {
                    "operation": f"{label(kind)}, n = {n}",
                    "first duals": name,
                    "passes on the GPU": passes,
                    **finish(cost, duals),
                }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one small size, nothing written")
    options = parser.parse_args(arguments)
    kinds = [("gaussian", 256, 0.0), ("log-normal", 256, 1.0), ("log-normal", 32, 1.0), ("sibling", 256, 0.5), ("sibling", 256, 3.0)]  # fmt: skip
    rows = []
    for row in measure(kinds[1:3], [96]) if options.tiny else measure(kinds, [2048]):
        rows.append(row)
        print(row, flush=True)
    if not options.tiny:
        head = machine() + (
            " Passes are products of all rows with all columns that a GPU would do; everything ran on this CPU, so only the "
            f"host's part is timed. Paths were given up after {CAP} refills a row (>). Temperatures and eps are in standard "
            "deviations of the costs; every Sinkhorn run and every auction starts from the norm shift."
        )
        record = {"machine": head, "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "duals.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "duals.md").write_text(markdown(record, "First duals for the list solver"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
