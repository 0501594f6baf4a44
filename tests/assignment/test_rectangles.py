"""Duals of matrices with more columns than rows: those of unmatched columns are the largest, whatever rounds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fastmatch.assignment import DenseShortlists, certificate, solve
from fastmatch.assignment.gap import settled
from fastmatch.assignment.shortest_paths import ShortestPaths
from helpers.networks import fresh_seed


def rows_of_many_scales(seed: int) -> np.ndarray:
    """Return 1 / (i + j) or random entries in random order, with rows from 1e-8 to 1e9, and more columns than rows."""
    g = np.random.default_rng(seed)
    n = int(g.integers(3, 120))
    m = int(n * g.uniform(1, 4)) + 1
    i, j = np.arange(1, n + 1)[:, None], np.arange(1, m + 1)
    cost = (1 / (i + j), g.random((n, m)), i * j / (n * m))[seed % 4 % 3]
    cost = cost * 10.0 ** g.uniform(-8, 9, (n, 1))
    return cost[g.permutation(n)][:, g.permutation(m)]


SCALED = (0, 28, 96, 304, 420, 444, 504, 2736, 4700)
"""Seeds whose searches round duals up, or lose what small rows decide."""


@pytest.mark.parametrize("seed", SCALED)
@pytest.mark.parametrize(
    "solver", [None, DenseShortlists(), ShortestPaths()], ids=["chosen", "lists", "numpy"]
)
def test_no_dual_of_a_rectangle_is_above_those_of_unmatched_columns(solver, seed):
    cost = rows_of_many_scales(seed)
    for given in (cost, np.ascontiguousarray(cost.T)):
        found = solve(given, solver=solver)
        v, columns = (found.v, found.col_ind) if given is cost else (found.u, found.row_ind)
        assert v.max() == np.delete(v, columns).min() == 0
        gap, bound = certificate(given, found)
        assert abs(gap - found.gap) <= bound
        assert gap <= bound


def test_settled_duals_are_feasible_and_near_what_they_were():
    g = np.random.default_rng(fresh_seed())
    cost, v = g.random((6, 40)), np.append(g.random(6) - 1, np.full(34, 7.0))
    v[2] = 7.001
    before = (cost - v).min(1)
    u, w, rounding = settled(before, v, np.arange(6))
    assert 0 < rounding < 1e-12
    assert (w <= 0).all()
    assert not w[6:].any()
    assert (u[:, None] + w <= cost + 1e-12).all()
    rows, columns = linear_sum_assignment(cost)
    assert u.sum() + w.sum() <= cost[rows, columns].sum() + 1e-12
    assert u.sum() + w.sum() == pytest.approx(before.sum() + v.sum() - 34 * 7.0 - 0.001)
