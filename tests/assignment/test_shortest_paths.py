"""Shortest augmenting paths in numpy against the compiled solvers."""

from __future__ import annotations

import numpy as np
import pytest

from fastmatch.assignment import SmallDense, small_dense, solve
from fastmatch.assignment.shortest_paths import ShortestPaths
from helpers.networks import fresh_seed

KINDS = {
    "normal": lambda g, n, m: g.standard_normal((n, m)),
    "ties": lambda g, n, m: g.integers(0, 3, (n, m)).astype(np.float32),
    "large": lambda g, n, m: 1e12 * g.standard_normal((n, m)),
    "products": lambda g, n, m: (g.standard_normal((n, 4)) @ g.standard_normal((4, m))).astype(np.float32),
    "equal rows": lambda g, n, m: np.tile(g.standard_normal((1, m)), (n, 1)),
    "constant": lambda g, n, m: np.ones((n, m)),
}


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (17, 17), (40, 40), (9, 14), (14, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_what_the_compiled_solver_finds_and_proves_it(kind, shape):
    g = np.random.default_rng(fresh_seed())
    cost = KINDS[kind](g, *shape)
    for maximize in (False, True):
        found, other = (solve(cost, maximize=maximize, solver=s) for s in (ShortestPaths(), SmallDense()))
        assert found.is_certified
        assert found.stats["solver"] == "ShortestPaths"
        size = float(np.abs(cost).sum())
        assert found.objective == pytest.approx(other.objective, rel=1e-12, abs=1e-14 * size)
        if kind == "normal":  # the optimum is unique
            assert found.col_ind.tolist() == other.col_ind.tolist()


def test_a_warm_start_is_used_and_changes_no_result():
    g = np.random.default_rng(fresh_seed())
    cost = g.standard_normal((40, 40))
    first = solve(cost, maximize=True, solver=ShortestPaths())
    nearly = cost + 1e-6 * g.standard_normal(cost.shape)
    cold = solve(nearly, maximize=True, solver=ShortestPaths())
    warm = solve(nearly, maximize=True, solver=ShortestPaths(), warm_start=first)
    assert warm.col_ind.tolist() == cold.col_ind.tolist()
    assert warm.is_certified
    assert warm.stats["pops"] < cold.stats["pops"]


def test_forbidden_entries_are_avoided_or_leave_no_assignment():
    g = np.random.default_rng(fresh_seed())
    cost = np.where(g.random((20, 20)) < 0.6, np.inf, g.standard_normal((20, 20)))
    cost[np.arange(20), g.permutation(20)] = 5.0
    found, other = (solve(cost, solver=s) for s in (ShortestPaths(), SmallDense()))
    assert found.objective == pytest.approx(other.objective)
    cost[:3] = np.inf
    cost[:3, :2] = 1.0  # three rows, two columns
    with pytest.raises(ValueError, match="no assignment avoids the forbidden entries"):
        solve(cost, solver=ShortestPaths())


@pytest.mark.parametrize("entry", [np.nan, -np.inf])
def test_wrong_entries_are_refused(entry):
    cost = np.ones((3, 3))
    cost[1, 2] = entry
    with pytest.raises(ValueError, match="cost: holds"):
        solve(cost, solver=ShortestPaths())


def test_costs_whose_sums_leave_float64_are_solved():
    cost = np.array([[1e308, 2.0], [3.0, 1e308]])
    assert solve(cost, solver=ShortestPaths()).col_ind.tolist() == [1, 0]
    assert solve(cost, maximize=True, solver=ShortestPaths()).col_ind.tolist() == [0, 1]


def test_a_warm_start_of_the_default_solver_needs_no_second_kernel(monkeypatch):
    """What solves by another schedule takes as long to compile as the rest of the solver."""

    def refuse(self, problem, matrix):
        raise AssertionError("compiled for another schedule")

    starts, real = [], small_dense.solve_small
    monkeypatch.setattr(SmallDense, "_scheduled", refuse)
    monkeypatch.setattr(
        small_dense, "solve_small", lambda *args, **kw: starts.append(kw["start"]) or real(*args, **kw)
    )
    g = np.random.default_rng(fresh_seed())
    cost = g.standard_normal((60, 60))
    first = solve(cost)
    nearly = cost + 1e-6 * g.standard_normal(cost.shape)
    cold, warm = solve(nearly), solve(nearly, warm_start=first)
    assert warm.col_ind.tolist() == cold.col_ind.tolist()
    assert warm.is_certified
    assert len(starts) == 1
    assert np.ptp(starts[0] - first.v) == pytest.approx(0.0, abs=1e-12)
