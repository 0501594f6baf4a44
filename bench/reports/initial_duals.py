"""How much work initial duals leave to the list solver, and how many passes over the cost they take.

    python -m bench.reports.initial_duals

A simulation on the CPU. A pass is one product of all rows with all columns, which a GPU would do. The host then runs the
list solver without initial duals of its own: row reduction, then shortest paths. Paths are given up after
:data:`MAX_REFILLS` refills per row.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.lib import record
from bench.lib.factor_pairs import FactorKind
from fastmatch.assignment import CandidateLists, FactorCost, LapProblem
from fastmatch.assignment.candidate_lists import _ListPhases, sampled_spread
from fastmatch_kernels import ops as kernels

NAME = "initial_duals"
MAX_REFILLS = 5
KINDS = (
    FactorKind("gaussian", 256),
    FactorKind("log-normal", 256, 1.0),
    FactorKind("log-normal", 32, 1.0),
    FactorKind("sibling", 256, 0.5),
    FactorKind("sibling", 256, 3.0),
)

Duals = tuple[torch.Tensor, float]
"""Column duals, and the passes over the cost that they took."""


def sinkhorn(a, b, start, spread, last: float, steps: int, relaxation: float) -> Duals:
    """Each step takes two products."""
    temperatures = (spread * np.geomspace(1, last, steps)).tolist()
    return kernels.sinkhorn_duals([(a, b)], temperatures, v=start, relaxation=relaxation), 2.0 * steps


def auction(a, b, start, spread, scales: tuple[float, ...], max_passes: float = 200.0) -> Duals:
    """All free rows bid at once, the best column against the second best. The highest bid for a column wins.

    A phase ends when one row in a hundred is free: price wars of the last rows would take most of the rounds.
    """
    n, v, passes = len(a), start.clone(), 0.0
    for scale in scales:
        owner, column = (torch.full((n,), -1) for _ in range(2))
        while passes < max_passes:
            free = (column < 0).nonzero()[:, 0]
            if len(free) <= n // 100:
                break
            item, cost, _ = kernels.row_topk([(a[free], b)], v, 2)
            value = cost - v[item]
            bid, wanted = value[:, 1] - value[:, 0] + scale * spread, item[:, 0]
            highest = torch.zeros(n).scatter_reduce(0, wanted, bid, "amax")
            top = bid >= highest[wanted]
            winner = torch.full((n,), -1).scatter(0, wanted[top], free[top])
            sold = (winner >= 0).nonzero()[:, 0]
            column[owner[sold][owner[sold] >= 0]] = -1
            owner[sold], column[winner[sold]] = winner[sold], sold
            v[sold] -= highest[sold]
            passes += len(free) / n
    return v, passes


def finish(cost: FactorCost, duals: torch.Tensor) -> record.Row:
    """Return what the host has left to do from these duals."""
    begin = time.perf_counter()
    work = _ListPhases(LapProblem(cost, -1.0, duals.double().numpy()), CandidateLists())
    work.fill()
    work.match_tight()
    work.reduce_rows()
    free = work.free()
    done = work.augment(MAX_REFILLS * len(duals))
    seconds = time.perf_counter() - begin
    reads, bids, pops, searches = (int(x) for x in work.counts)
    return {
        "free rows": free,
        "refills per row": reads / len(duals) if done else f"> {MAX_REFILLS}",
        "bids per row": bids / len(duals),
        "searches": searches if done else f"> {searches}",
        "columns popped": pops if done else f"> {pops}",
        "finish (s)": seconds if done else f"> {seconds:.1f}",
    }


def starts(a, b, start, spread) -> Iterator[tuple[str, Callable[[], Duals]]]:
    """Yield the initial duals that are compared, by name."""
    yield "norm shift", lambda: (start, 0.0)
    for scales in ((0.1,), (0.5, 0.1, 0.02)):
        name = ", ".join(map(str, scales))
        yield f"auction rounds, eps {name}", lambda s=scales: auction(a, b, start, spread, s)
    for given in ((0.01, 10, 1.0), (0.003, 20, 1.0), (0.003, 20, 1.8), (0.003, 40, 1.0), (0.003, 40, 1.8)):
        last, steps, relaxation = given
        name = f"Sinkhorn, {steps} steps to {last}" + (f", relaxed {relaxation}" if relaxation != 1 else "")
        yield name, lambda g=given: sinkhorn(a, b, start, spread, *g)


def rows(kinds: tuple[FactorKind, ...], n: int) -> Iterator[record.Row]:
    small = torch.eye(64)
    finish(FactorCost([(small, small)]), torch.zeros(64))  # compiles
    for kind in kinds:
        a, b = kind.draw(n, seed=1)
        cost = FactorCost([(a, b)])
        spread = sampled_spread(cost)
        start = torch.from_numpy(cost.first_duals(-1.0)).float()
        for name, make in starts(a, b, start, spread):
            duals, passes = make()
            yield {
                "cost": f"{kind}, n = {n}",
                "initial duals": name,
                "passes on the GPU": passes,
                **finish(cost, duals),
            }


def measure(options: argparse.Namespace) -> record.Record:
    measured = rows(KINDS[1:3], 40) if options.tiny else rows(KINDS, 2048)
    return record.record(measured, **{"refills per row, at most": MAX_REFILLS})


def page(found: record.Record) -> str:
    return record.page(
        "Initial duals for the list solver", NAME, found,
        "A pass is one product of all rows with all columns, which a GPU would do. Everything ran on the CPU, so only the "
        f"host's part is timed. Paths were given up after {found['settings']['refills per row, at most']} refills per row (>). "
        "Temperatures and eps are in standard deviations of the costs. Every Sinkhorn run and every auction starts from the "
        "norm shift.",
        record.sections(found["rows"], by="cost"),
    )  # fmt: skip


main = record.script(NAME, __doc__, measure, page)

if __name__ == "__main__":
    sys.exit(main())
