"""Whether an assignment is the only best one, against all permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastmatch.assignment import SmallDense, solve
from fastmatch.assignment.shortest_paths import ShortestPaths
from fastmatch.assignment.uniqueness import is_only_optimum
from helpers.networks import fresh_seed


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("solver", [ShortestPaths(), SmallDense()], ids=["numpy", "compiled"])
def test_it_says_what_all_permutations_say(solver, maximize):
    g = np.random.default_rng(fresh_seed())
    said = []
    for _ in range(400):
        n = int(g.integers(2, 6))
        cost = g.integers(0, int(g.integers(2, 12)), (n, n)).astype(np.float32)
        totals = sorted(cost[range(n), order].sum() for order in itertools.permutations(range(n)))
        is_only = totals[-1] > totals[-2] if maximize else totals[0] < totals[1]
        found = solve(cost, maximize=maximize, solver=solver)
        assert is_only_optimum(cost, found, maximize=maximize) == is_only
        said.append(is_only)
    assert 0 < sum(said) < len(said)


@pytest.mark.parametrize("difference", [1e-9, 1e-16])
def test_what_rounding_can_hide_is_no_difference(difference):
    cost = np.ones((4, 4)) + np.eye(4)[::-1]
    cost[0, 0] -= 0.5
    cost[1, 1] -= 0.5
    cost[2, 2] -= 0.5  # rows 0 to 2 take their own columns, and row 3 the last
    cost[0, 1] -= 0.5
    cost[1, 0] -= 0.5 + difference  # exchanging rows 0 and 1 is better by the difference
    found = solve(cost)
    assert is_only_optimum(cost, found, maximize=False) == (difference > 1e-12)


def test_many_entries_of_no_reduced_cost_are_not_looked_through():
    """Zeros above the diagonal form no cycle, so the diagonal is the only best assignment."""
    for n, is_said in ((6, True), (40, False)):
        cost = np.tril(np.ones((n, n)), -1)
        found = solve(cost)
        assert found.col_ind.tolist() == list(range(n))
        assert is_only_optimum(cost, found, maximize=False) == is_said


def test_what_is_not_certified_is_not_called_the_only_one():
    cost = np.array([[1.0, 2.0], [3.0, 1.0]])
    found = solve(cost)
    assert is_only_optimum(cost, found, maximize=False)
    other = type(found)(found.row_ind, found.col_ind, found.u, found.v, found.objective, 1.0, 1e-12)
    assert not is_only_optimum(cost, other, maximize=False)
