"""Matrices with a few more columns than rows, which are solved as if rows of zeros made them square."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import DenseShortlists, SmallDense

FAMILY = ["sums with noise", "graph gradient, hubs", "three choices", "uniform", "column scales", "products"]
SOLVERS = [None, SmallDense(), DenseShortlists()]
REPEATED = [(200, 201), (200, 230), (200, 700)]


def check(cost: np.ndarray, found: fm.Assignment, maximize: bool = False) -> None:
    """The solution is proved, as good as scipy's, and columns without a row have the dual that a rectangle demands."""
    rows, cols = linear_sum_assignment(cost, maximize)
    best, size = cost[rows, cols].sum(dtype=float), np.abs(cost[rows, cols]).sum(dtype=float)
    assert found.objective == pytest.approx(best, rel=0, abs=1e-12 * size)
    assert found.is_certified
    gap, bound = fm.assignment.certificate(cost, found, maximize=maximize)
    assert gap <= bound
    duals = found.v if cost.shape[0] < cost.shape[1] else found.u
    taken = found.col_ind if cost.shape[0] < cost.shape[1] else found.row_ind
    duals = -duals if maximize else duals
    assert (np.delete(duals, taken) == 0).all()
    assert duals.max() == 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(300, 301), (320, 288), (90, 100), (8, 9)])
@pytest.mark.parametrize("family", FAMILY)
def test_every_solver_proves_its_solution(family, shape, solver):
    cost = FAMILIES[family](*shape, seed=2)
    check(cost, fm.solve(cost, solver=solver))
    check(cost, fm.solve(cost, maximize=True, solver=solver), maximize=True)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("shape", [(400, 401), (400, 440)])
def test_it_takes_no_more_work_than_the_square_matrix(shape, family, solver):
    n, m = shape
    cost = FAMILIES[family](n, m, seed=2)
    square = np.zeros((m, m))
    square[:n] = cost
    ours, theirs = (fm.solve(c, solver=solver) for c in (cost, square))
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)

    def work(found: fm.Assignment) -> int:
        return sum(found.stats[k] for k in ("reads", "bids", "pops", "searches"))

    assert work(ours) <= 1.5 * work(theirs) + 2 * n


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
def test_types(dtype):
    cost = FAMILIES["scheduling"](300, 310, seed=4, dtype="int32").astype(dtype)
    check(cost, fm.solve(cost))
    check(cost.T, fm.solve(cost.T))


@pytest.mark.parametrize("shape", [(1050, 1100), (1100, 1050)])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_large_matrix(shape, maximize):
    g = np.random.default_rng(7)
    cost = g.random((shape[0], 1)) + g.random(shape[1]) + 0.01 * g.random(shape)
    found = fm.solve(cost, maximize=maximize)
    assert (np.diff(found.row_ind) > 0).all()
    check(cost, found, maximize)


def test_a_stack():
    stack = np.stack([FAMILIES["sums with noise"](100, 104, seed=k) for k in range(5)])
    for cost, cols in zip(stack, fm.assignment.solve_batched(stack), strict=True):
        rows, best = linear_sum_assignment(cost)
        assert cost[np.arange(100), cols].sum() == pytest.approx(cost[rows, best].sum(), rel=1e-12)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        *((name, shape) for name in ("equal rows", "clusters, rows repeated") for shape in REPEATED),
        ("graph barycentre, hubs", REPEATED[0]),
        ("graph barycentre, hubs", REPEATED[2]),
    ],
)
def test_equal_rows_are_one_row_with_room_for_several(family, shape):
    """Rows of zeros are equal rows too. So a wide matrix of few different rows is not solved row by row."""
    cost = FAMILIES[family](*shape, seed=1)
    found = fm.solve(cost, solver=DenseShortlists())
    check(cost, found)
    assert found.stats["reads"] <= 8 * max(shape)


def test_forbidden_entries_leave_the_columns_that_no_row_wants():
    cost = FAMILIES["half forbidden"](200, 204, seed=0)
    for solver in SOLVERS:
        check(cost, fm.solve(cost, solver=solver))
    cost[:, 199:] = np.inf
    for solver in SOLVERS:
        with pytest.raises(ValueError, match=r"^cost: no assignment"):
            fm.solve(cost, solver=solver)


@pytest.mark.parametrize("n", [60, 300, 700])
def test_crowded_rows_that_row_reduction_matches_are_read_once(n):
    cost = FAMILIES["staircase"](n, n + 1, seed=0, dtype="float64")
    found = fm.solve(cost)
    assert found.stats["reads"] == n
    assert found.stats["pops"] == 0
    assert abs(found.objective - cost[linear_sum_assignment(cost)].sum()) <= found.gap_bound * 2
