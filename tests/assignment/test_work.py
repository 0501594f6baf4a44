"""How much work a solve takes, in reads, bids and steps, where a rule that suits most costs would take far too much."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from bench.lib.families import FAMILIES
from fastmatch.assignment import DenseShortlists, SmallDense
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch.assignment.small_dense import solve_small
from fastmatch_kernels.lap.state import SOLVED

SOLVERS = [None, DenseShortlists()]
LARGEST = np.finfo(np.float64).max


def solved(cost: np.ndarray, solver: object = None) -> fm.Assignment:
    """Return the solution, which is scipy's and proved."""
    found = fm.solve(cost, solver=solver)
    best = cost[linear_sum_assignment(cost)].sum()
    assert found.objective == pytest.approx(best, rel=1e-12)
    assert found.is_certified
    gap, bound = fm.assignment.certificate(cost, found)
    assert gap <= bound
    return found


def wanted_by_all(n: int, m: int, wanted: int, dtype: type = np.float64) -> np.ndarray:
    """Rows differ in few columns only, and these are the cheapest for all of them."""
    g = np.random.default_rng(n + m)
    cost = np.ones((n, m))
    cost[:, g.permutation(m)[:wanted]] = g.random((n, wanted))
    return cost.astype(dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(300, 300), (300, 303), (200, 700)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_one_column_that_all_rows_want_takes_a_read_and_no_path(solver, shape, dtype):
    found = solved(wanted_by_all(*shape, 1, dtype), solver)
    assert found.stats["searches"] == 0
    assert found.stats["reads"] == shape[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_reduction_from_the_survey_is_undone_if_it_matches_few_rows(solver):
    """All rows want the same columns in the same order: a row's second column is free only at first."""
    g = np.random.default_rng(3)
    cost = g.random((300, 1)) + g.permutation(300) + 0.2 * g.random((300, 300))
    solved(cost, solver)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(300, 300), (300, 310), (100, 400)])
@pytest.mark.parametrize("maximize", [False, True])
def test_huge_entries_that_nobody_needs_cost_no_second_solve(solver, shape, maximize):
    """Entries near the largest float become forbidden by a factor, in place; forbidden ones take as many bids and paths."""
    g = np.random.default_rng(5)
    cost = g.random(shape)
    rare = g.random(shape) < 0.5
    huge, forbidden = np.where(rare, LARGEST, cost), np.where(rare, np.inf, cost)
    sign = -1 if maximize else 1
    ours = fm.solve(sign * huge, maximize=maximize, solver=solver)
    theirs = fm.solve(sign * forbidden, maximize=maximize, solver=solver)
    assert (ours.col_ind == theirs.col_ind).all()
    assert ours.objective == theirs.objective
    for count in ("bids", "pops", "searches"):
        assert ours.stats[count] == theirs.stats[count]
    gap, bound = fm.assignment.certificate(sign * huge, ours, maximize=maximize)
    assert gap <= bound
    if solver is None:
        assert solve_small(huge, False, proof=False)[0] == SOLVED


@pytest.mark.parametrize("solver", SOLVERS)
def test_huge_entries_that_are_needed_are_used_as_rarely_as_possible(solver):
    g = np.random.default_rng(6)
    cost = g.random((60, 60))
    cost[:3] = LARGEST / 128
    cost[g.random(cost.shape) < 0.5] = LARGEST / 128
    found = fm.solve(cost, solver=solver)
    rows, cols = linear_sum_assignment(cost)
    assert (cost[found.row_ind, found.col_ind] > 1).sum() == (cost[rows, cols] > 1).sum() == 3


@pytest.mark.parametrize("shape", [(60, 60), (50, 200)])
def test_costs_that_are_all_huge_are_solved_in_one_call(shape):
    cost = 2e306 * np.random.default_rng(7).standard_normal(shape)
    assert solve_small(cost, False, proof=True)[0] == SOLVED
    smaller = cost * 2.0**-128
    ours, theirs = fm.solve(cost), fm.solve(smaller)
    assert (ours.col_ind == theirs.col_ind).all()
    np.testing.assert_array_equal(ours.u, theirs.u * 2.0**128)
    np.testing.assert_array_equal(ours.v, theirs.v * 2.0**128)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_of_huge_costs_gives_the_optimum(solver):
    """All rows want the same columns, but no room is made for first duals other than the given ones."""
    g = np.random.default_rng(12)
    cost = (2 * g.random((80, 1)) + g.random(80)) ** 2 * 1e306
    for _ in range(5):  # writes beyond an array's end need not show at once
        found = fm.solve(cost, warm_start=fm.solve(g.random((80, 80))), solver=solver)
        best = cost[linear_sum_assignment(cost * 1e-100)] * 1e-100
        assert (cost[found.row_ind, found.col_ind] * 1e-100).sum() == pytest.approx(best.sum(), rel=1e-12)


@pytest.mark.parametrize("n", [300, 1100])
def test_a_price_war_that_matches_few_rows_is_undone(n):
    """Points that are far from most others: in the auction, rows bid for the few columns that are near."""
    g = np.random.default_rng(8)
    near = 0.9 / n**0.5
    cost = np.linalg.norm(g.random((n, 1, 2)) - g.random((n, 2)), axis=2)
    cost[cost > near] = 1e9
    found = solved(cost, DenseShortlists())
    assert found.stats["pops"] < 4 * n


def test_row_reduction_goes_on_while_it_matches_many_rows():
    """With heavy tails, each row has a column of its own that is far better than the rest."""
    found = solved(np.random.default_rng(9).standard_cauchy((1100, 1100)), DenseShortlists())
    assert found.stats["searches"] < 20


@pytest.mark.parametrize(("n", "solver"), [(300, None), (1100, None), (1100, DenseShortlists())])
def test_short_paths_among_ties_go_on_to_the_end(n, solver):
    """Graph matching on a web: most entries of a row tie, and many rows want the few columns of the hubs."""
    found = solved(FAMILIES["graph gradient, hubs"](n, n, seed=0), solver)
    assert found.stats["bids"] == 0
    assert found.stats["reads"] < 5 * n


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_not_read_for_the_proof_if_the_survey_bounds_them(solver):
    """Each row has a column of its own: one read settles the assignment and the row duals."""
    g = np.random.default_rng(11)
    cost = 1 + g.random((300, 300))
    cost[np.arange(300), g.permutation(300)] = g.random(300)
    found = solved(cost, solver)
    assert found.stats["reads"] == 300


@pytest.mark.parametrize(("n", "solver"), [(300, None), (1500, None), (1500, DenseShortlists())])
def test_paths_from_zeros_end_a_price_war_if_they_are_short(n, solver):
    """Three choices for every row: other first duals leave fewer rows free, but their paths lead through half of the columns."""
    found = solved(FAMILIES["three choices"](n, n, 0, "float64"), solver)
    assert found.stats["bids"] > n
    assert found.stats["pops"] < 2 * n


@pytest.mark.parametrize("family", ["clusters, rows repeated", "column scales"])
def test_paths_from_other_duals_take_over_if_those_from_zeros_are_long(family):
    found = solved(FAMILIES[family](300, 300, 0, "float64"))
    assert found.stats["pops"] < 40 * 300


def test_no_auction_runs_if_nearly_every_path_ends_at_once():
    found = solved(FAMILIES["zero units, unequal"](1500, 1500, 0, "float64"), DenseShortlists())
    assert found.stats["bids"] < 2 * 1500


@pytest.mark.parametrize(("step", "looked_at"), [(1.0, False), (2.0**-10, True)])
def test_large_duals_of_integers_hide_nothing_and_the_matrix_is_not_read_again(step, looked_at, monkeypatch):
    """Differences of degrees have duals near the largest degree, and most matched costs are small."""
    module = sys.modules["fastmatch.assignment.solve"]
    asked = []
    monkeypatch.setattr(
        module, "_is_large", lambda *given, ask=module._is_large: asked.append(ask(*given)) or asked[-1]
    )
    solved(FAMILIES["differences of degrees"](1500, 1500, 0) * step, DenseShortlists())
    assert asked == [looked_at]


def test_row_reduction_ends_by_every_schedule():
    """With a fraction of 1, rounds that match no row went on without end."""
    cost = np.random.default_rng(0).integers(0, 4, (120, 120)).astype(float)
    for busy_above in (0.5, 1.0):
        solved(cost, DenseShortlists(DenseSchedule(busy_above=busy_above)))
    g = np.random.default_rng(1)
    solved(g.random((120, 1)) + g.random((1, 120)), DenseShortlists(DenseSchedule(busy_above=1.0)))


def test_duals_no_larger_than_a_matched_cost_are_not_doubted(monkeypatch):
    """A row that costs 1e9 in every column has a dual of that size: smaller entries would not change it."""
    module = sys.modules["fastmatch.assignment.solve"]
    monkeypatch.setattr(module, "_is_large", lambda *given: pytest.fail("the matrix was sampled"))
    cost = np.random.default_rng(5).random((1100, 1100))
    cost[7] += 1e9
    found = solved(cost, SmallDense())
    assert found.is_certified
    found = solved(cost)
    assert found.is_certified


@pytest.mark.parametrize("n", [300, 900])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_warm_start_that_does_not_help_is_dropped(n, maximize):
    """Duals of another problem, many of which tie in this one: all rows moved all others."""
    g = np.random.default_rng(13)
    other = fm.solve(g.random((n, n)), maximize=maximize)
    cost = np.round(1000 + g.random((n, n)), 1)
    found = fm.solve(cost, maximize=maximize, warm_start=other)
    assert found.objective == fm.solve(cost, maximize=maximize).objective
    assert found.is_certified
    assert found.stats["pops"] < n
