"""Suite ``assignment``: one large problem, many small ones, and a problem solved again after a small change."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.lib.paired import compare
from bench.lib.peers import batch_solvers, solvers
from bench.lib.problems import problem
from fastmatch.assignment import linear_sum_assignment, solve, solve_batched

PEERS = ("scipy", "lapjv", "laprust")


def total(cost: np.ndarray, columns: np.ndarray) -> float:
    return math.fsum(cost[np.arange(len(cost)), columns].astype(np.float64))


def same_objective(cost):
    def check(name, ours, theirs):
        best, other = total(cost, ours), total(cost, theirs)
        assert best <= other + 1e-6 * abs(other), (name, best, other)

    return check


@pytest.mark.widths(quick=(256, 512), full=(256, 512, 1024, 2048, 4096, 8192))
@pytest.mark.parametrize("kind", ["gaussian", "factors 256"])
def test_one_large(benchmark, kind, width):
    cost = problem(kind, width)
    installed = solvers()[0]
    peers = {k: lambda f=installed[k]: f(cost) for k in PEERS if k in installed}
    if width > 4096:  # the others take half a minute and more
        peers = {"laprust": peers["laprust"]}
    compare(
        benchmark, suite="assignment", instance=kind, size=width, peers=peers, check=same_objective(cost),
        ours=lambda: linear_sum_assignment(cost)[1], rounds=3 if width < 4096 else 1, neurons=width,
    )  # fmt: skip


@pytest.mark.widths(quick=(32, 64), full=(32, 64, 128))
def test_many_small(benchmark, width):
    stack = np.random.default_rng(3).standard_normal((2**18 // width, width, width)).astype(np.float32)

    def check(name, ours, theirs):
        sums = [
            np.take_along_axis(stack, np.asarray(c)[:, :, None], 2).sum(dtype=np.float64)
            for c in (ours, theirs)
        ]
        assert sums[0] <= sums[1] + 1e-6 * abs(sums[1]), (name, sums)

    peers = {name: lambda f=f: f(stack) for name, f in batch_solvers().items()}
    compare(
        benchmark, suite="assignment", instance="many small", size=width, peers=peers, check=check,
        ours=lambda: solve_batched(stack), neurons=len(stack) * width,
    )  # fmt: skip


@pytest.mark.widths(quick=(512,), full=(1024, 2048, 4096))
def test_warm(benchmark, width):
    cost = problem("gaussian", width)
    before = solve(cost)
    g = np.random.default_rng(4)
    changed = cost.copy()
    rows = g.permutation(width)[: width // 50]
    changed[rows] += 0.1 * g.standard_normal((len(rows), width), np.float32)
    scipy = solvers()[0]["scipy"]
    compare(
        benchmark, suite="assignment", instance="warm, 2% of rows changed", size=width, check=same_objective(changed),
        ours=lambda: solve(changed, warm_start=before).col_ind,
        peers={"scipy": lambda: scipy(changed), "fastmatch, cold": lambda: solve(changed).col_ind},
        neurons=width,
    )  # fmt: skip
