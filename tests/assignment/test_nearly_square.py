"""Matrices with few more columns than rows whose paths would be long, and matrices with sentinels: solved once, and shortly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from fastmatch.assignment.small_dense import solve_small
from fastmatch_kernels.lap.state import SOLVED

SOLVERS = [None, fm.assignment.DenseShortlists()]


def sums(n: int, m: int, seed: int = 0) -> np.ndarray:
    """Costs of biases of rows and columns: every row wants the same column."""
    g = np.random.default_rng(seed)
    return g.random((n, 1)) + g.random((1, m))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("columns", [121, 130, 135, 136, 160])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("tall", [False, True])
def test_sums_are_solved_in_every_orientation(solver, columns, maximize, tall):
    cost = sums(120, columns).T if tall else sums(120, columns)
    found = fm.solve(cost, maximize=maximize, solver=solver)
    rows, cols = linear_sum_assignment(cost, maximize)
    assert found.objective == pytest.approx(cost[rows, cols].sum(), rel=1e-12)
    assert found.is_certified
    assert (np.diff(found.row_ind) > 0).all()
    assert found.u.shape == cost.shape[:1]
    assert found.v.shape == cost.shape[1:]
    gap, bound = fm.assignment.certificate(cost, found, maximize=maximize)
    assert gap <= bound
    assert abs(found.u.sum() + found.v.sum() - found.objective) <= found.gap_bound, "duals are not anchored"
    pairs = fm.linear_sum_assignment(cost, maximize)
    assert cost[pairs].sum() == pytest.approx(found.objective, rel=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("columns", [301, 330])
def test_paths_stay_short(solver, columns):
    cost = sums(300, columns)
    found = fm.solve(cost, solver=solver)
    assert found.stats["pops"] < 30 * len(cost), "every path moved all rows"


@pytest.mark.parametrize("solver", SOLVERS)
def test_forbidden_entries_stay_forbidden(solver):
    cost = sums(120, 124)
    cost[np.random.default_rng(1).random(cost.shape) < 0.5] = np.inf
    found = fm.solve(cost, solver=solver)
    rows, cols = linear_sum_assignment(cost)
    assert found.objective == pytest.approx(cost[rows, cols].sum(), rel=1e-12)
    cost[:, 100:] = np.inf
    with pytest.raises(ValueError, match="no assignment"):
        fm.solve(cost, solver=solver)


@pytest.mark.parametrize("sentinel", [1e9, 1e12, 1e30])
@pytest.mark.parametrize("shape", [(300, 300), (300, 301), (300, 400)])
def test_a_matrix_with_sentinels_is_solved_once(sentinel, shape):
    g = np.random.default_rng(0)
    cost = np.where(g.random(shape) < 0.95, sentinel, g.random(shape))
    state, (_, _, v, _) = solve_small(cost, False, proof=True)
    assert state == SOLVED
    assert np.abs(v).max() < 1e6, "duals are as large as sentinels, and hide small costs"


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(60, 60), (60, 61), (90, 60)])
def test_the_largest_float_means_never(maximize, shape):
    g = np.random.default_rng(2)
    plain = g.standard_normal(shape)
    never = np.finfo(np.float64).max * (-1 if maximize else 1)
    forbidden = g.random(shape) < 0.8
    found = fm.solve(np.where(forbidden, never, plain), maximize=maximize)
    same = fm.solve(np.where(forbidden, -np.inf if maximize else np.inf, plain), maximize=maximize)
    assert found.objective == same.objective
    assert found.is_certified
    assert np.abs(found.v).max() < 1e6
