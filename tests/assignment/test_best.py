"""The best columns that are kept for rows: what they tell is what a read of the whole row tells, as long as duals fall."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import DenseShortlists, dense_shortlists
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels.lap.best import best_two, least_of
from fastmatch_kernels.lap.bids import bid_rows
from fastmatch_kernels.lap.kept import keep, take
from fastmatch_kernels.lap.match import survey, survey_best
from fastmatch_kernels.lap.state import KEPT, VECTOR, Best, Costs, State, new_best
from helpers.networks import fresh_seed


@numba.njit
def ask(costs, v, best, i):
    """What is kept for row i tells its least c - v, or -inf; then its two best columns."""
    return least_of(v, best, i), best_two(costs, v, best, i)


def bound_of(best: Best, i: int) -> float:
    return best.numbers[len(best.items) + i]


def bounds(state: State) -> np.ndarray:
    return state.best.numbers[len(state.best.items) :][: len(state.least)]


def entries(kind: str, g: np.random.Generator, n: int, m: int, dtype: str) -> np.ndarray:
    x = g.standard_normal((n, m)) if kind == "normal" else g.integers(0, 3, (n, m)).astype(float)
    if kind == "few allowed":
        x[g.random((n, m)) < 0.97] = np.inf
    return x.astype(dtype)


def state_of(n: int, m: int, kept: int) -> State:
    width = -(-m // VECTOR) * VECTOR
    rows, columns = np.full(n, -1), np.full(m, -1)
    return State(
        np.zeros(width), columns, rows, np.zeros(n), np.zeros(n), rows.copy(), rows.copy(), np.zeros(4, int), new_best(kept)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["normal", "ties", "few allowed"])
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 64, 100, 300])
def test_two_best_columns_are_those_of_a_read(dtype, kind, columns):
    g = np.random.default_rng(fresh_seed())
    n, sign = 4, float(g.choice([-1.0, 1.0]))
    matrix = entries(kind, g, n, columns, dtype)
    c = sign * matrix.astype(float)  # what is minimised; forbidden entries are inf in it
    given = np.where(np.isinf(matrix), sign * np.inf, matrix).astype(dtype)
    c[np.isinf(matrix)] = np.inf
    costs = Costs(given.reshape(-1), np.int64(0), n, columns, sign)
    v, best = np.zeros(-(-columns // VECTOR) * VECTOR), new_best(n)
    read = 0
    for _ in range(300):
        i = int(g.integers(n))
        known, (first, j, second, tied, again) = ask(costs, v, best, i)
        reduced = c[i] - v[:columns]
        least = np.sort(np.append(reduced, np.inf))
        assert (first, second) == (least[0], least[1])
        assert known in (-np.inf, first)
        read += again
        if first < np.inf:
            assert reduced[j] == first
            assert second > first or reduced[tied] == first
        others = np.setdiff1d(np.arange(columns), best.items[VECTOR * i : VECTOR * (i + 1)])
        assert (reduced[others] >= bound_of(best, i)).all(), "a bound on the other columns"
        if first < np.inf:
            v[j] -= g.random() if second == np.inf else second - first + 0.05 * g.random()
    if (columns, kind) == (300, "normal"):
        assert read < 150, "most questions are answered without a read"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["normal", "ties", "few allowed"])
@pytest.mark.parametrize("columns", [8, 45, 130])
def test_a_first_read_that_keeps_columns_finds_what_one_without_finds(dtype, kind, columns):
    g = np.random.default_rng(fresh_seed())
    n = 40
    matrix = entries(kind, g, n, columns, dtype)
    plain, kept = state_of(n, columns, 0), state_of(n, columns, n)
    costs = Costs(matrix.reshape(-1), np.int64(0), n, columns, 1.0)
    sizes = [read(costs, state, 0, n, False) for read, state in ((survey, plain), (survey_best, kept))]
    finite = matrix[np.isfinite(matrix)].astype(float)
    assert sizes == pytest.approx([np.abs(finite).sum()] * 2)
    assert np.array_equal(plain.least, kept.least)
    assert np.array_equal(plain.seconds, kept.seconds)
    allowed = plain.least < np.inf
    rows = np.flatnonzero(allowed)
    assert np.array_equal(matrix[rows, kept.columns[allowed]], matrix[rows, plain.columns[allowed]])


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
def test_a_first_read_that_keeps_columns_finds_what_is_no_cost(wrong):
    matrix = np.random.default_rng(0).random((20, 70))
    matrix[11, 69] = wrong
    costs = Costs(matrix.reshape(-1), np.int64(0), 20, 70, 1.0)
    assert not survey_best(costs, state_of(20, 70, 20), 0, 20, False) < np.inf


def test_what_is_kept_is_forgotten_where_duals_may_rise():
    n = m = 100
    matrix, state = np.random.default_rng(1).random((n, m)), state_of(n, m, n)
    survey_best(Costs(matrix.reshape(-1), np.int64(0), n, m, 1.0), state, 0, n, False)
    assert (bounds(state) > 0).all()
    room = np.empty(KEPT * m + len(state.v))
    keep(room, 0, state)
    take(room, 0, state)
    assert (bounds(state) == -np.inf).all()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("eps", [0.0, 0.01])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("kind", ["normal", "ties", "few allowed"])
def test_bids_keep_the_matching_the_stack_and_the_bounds_true(kind, ties, eps, kept):
    g = np.random.default_rng(fresh_seed())
    n, m = 60, 75
    matrix = entries(kind, g, n, m, "float64")
    state = state_of(n, m, n if kept else 0)
    costs = Costs(matrix.reshape(-1), np.int64(0), n, m, 1.0)
    survey(costs, state, 0, n, False)
    top = n
    state.stack[:] = g.permutation(n)
    for limit in (1, 2, 7, 40, 300):
        left = bid_rows(costs, state, top, eps, limit, ties)
        made = state.counts[1]
        assert made <= limit + 1
        state.counts[1] = 0
        waiting, matched = state.stack[:left], np.flatnonzero(state.col_of >= 0)
        assert len(set(waiting.tolist())) == left
        assert not set(waiting.tolist()) & set(matched.tolist())
        assert np.array_equal(state.row_of[state.col_of[matched]], matched)
        assert (state.row_of >= 0).sum() == len(matched)
        reduced = matrix - state.v[:m]
        for i in matched:
            others = np.delete(reduced[i], state.columns[i])
            assert others.min() >= state.seconds[i] - 1e-12
            assert reduced[i, state.col_of[i]] <= others.min() + 2 * eps + 1e-12
        state.stack[: n - len(matched)] = np.flatnonzero(state.col_of < 0)[::-1]
        top = n - len(matched)


@pytest.mark.parametrize("family", ["products", "uniform", "column scales"])
def test_what_is_kept_is_forgotten_when_a_rectangle_is_begun_again(family):
    n, m = 160, 320
    cost = np.ascontiguousarray(FAMILIES[family](n, m, seed=0, dtype="float64"))
    dense_shortlists.compile_kernels(cost.dtype)
    phases = dense_shortlists._DensePhases(cost, 1.0, DenseSchedule(), None)
    phases.survey()
    phases.reduce_by_rows()
    phases.begin_again(as_square=False)
    for _ in range(2):
        reduced, best = cost - phases.v, phases.state.best
        for i in range(n):
            others = np.setdiff1d(np.arange(m), best.items[VECTOR * i : VECTOR * (i + 1)])
            assert reduced[i, others].min() >= bound_of(best, i)
        phases.reduce_by_rows()
    assert phases.v.min() < 0, "rows have bid"


@pytest.mark.parametrize("shape", [(60, 150), (150, 60)])
@pytest.mark.parametrize("family", ["products", "uniform", "column scales"])
def test_every_beginning_of_a_rectangle_ends_in_a_proof(family, shape, monkeypatch):
    """As a rectangle, as a square, and as a rectangle to the end: each begins with duals of zero."""
    begun, solve_free = [], dense_shortlists._DensePhases.solve_free

    def given_up(self):
        begun.append(self.as_square)
        return solve_free(self) and len(begun) > 2

    monkeypatch.setattr(dense_shortlists._DensePhases, "solve_free", given_up)
    cost = FAMILIES[family](*shape, seed=1, dtype="float64")
    found = fm.solve(cost, solver=DenseShortlists())
    assert begun == [False, True, False]
    gap, bound = fm.assignment.certificate(cost, found)
    assert gap <= bound
    assert found.is_certified


@pytest.mark.parametrize("solver", [None, DenseShortlists()])
def test_rows_take_free_copies_of_a_column_without_a_path(solver):
    """Half of the columns are zero: a row has hundreds of best columns."""
    found = fm.solve(FAMILIES["half of the units zero"](1100, 2200, seed=0), solver=solver)
    assert found.is_certified
    assert found.stats["pops"] < 110


@pytest.mark.parametrize("family", ["widened twice", "rows and columns three times", "graph gradient, hubs"])
def test_short_paths_come_before_copies_are_looked_for(family):
    """A row of a rectangle with copies finds a free column after a few scans: all columns need not be compared."""
    n = 1100
    found = fm.solve(FAMILIES[family](n, 2 * n, seed=0), solver=DenseShortlists())
    assert found.is_certified
    assert found.stats["searches"] < n, "every row had a path of its own"
