"""Matrices with few more columns than rows whose paths would be long, and matrices with sentinels: solved once, and shortly."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import dense_shortlists
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch.assignment.small_dense import solve_small
from fastmatch_kernels.lap.first import _as_rectangle, new_state, start
from fastmatch_kernels.lap.kept import keep, room_to_keep
from fastmatch_kernels.lap.match import free_rows
from fastmatch_kernels.lap.schedule import SmallSchedule
from fastmatch_kernels.lap.state import CROWDED, OPEN, SOLVED, Costs

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


def test_levelling_columns_ends_early_if_it_would_take_long():
    """The problem is then begun in another way, and no dual is left above an unmatched column's."""
    cost = np.ascontiguousarray(FAMILIES["uniform"](120, 130, seed=0, dtype="float64"))
    dense_shortlists.compile_kernels(cost.dtype)
    phases = dense_shortlists._DensePhases(cost, 1.0, DenseSchedule(), None)
    phases.survey()
    assert phases.as_square
    assert phases.solve_free()
    phases.limit = 1.0
    assert not phases.level_columns()
    phases.begin_again(as_square=True)
    phases.limit = np.inf
    assert phases.solve_free()
    assert phases.level_columns()
    unmatched = np.setdiff1d(np.arange(130), phases.col_of)
    assert (phases.v[unmatched] == phases.v.max()).all()


@numba.njit
def tried_as_rectangle(costs, schedule):
    """What ``_as_rectangle`` returns, and the state before and after it."""
    state = new_state(costs.n, costs.m)
    start(costs, state, False, False, True, schedule)
    top = free_rows(state)
    before, after = np.zeros(room_to_keep(state)), np.zeros(room_to_keep(state))
    keep(before, np.int64(0), state)
    outcome = _as_rectangle(costs, state, top, schedule)
    keep(after, np.int64(0), state)
    return outcome, free_rows(state), before, after


@pytest.mark.parametrize(("family", "wanted"), [("staircase", OPEN), ("products", CROWDED)])
def test_rows_that_are_tried_as_those_of_a_rectangle_are_all_matched_or_left_as_they_were(family, wanted):
    cost = np.ascontiguousarray(FAMILIES[family](300, 301, seed=0, dtype="float64"))
    costs = Costs(cost.reshape(-1), np.int64(0), 300, 301, 1.0)
    outcome, free, before, after = tried_as_rectangle(costs, SmallSchedule())
    assert outcome == wanted
    if outcome == OPEN:
        assert free == 0
    else:
        assert np.array_equal(before, after)
