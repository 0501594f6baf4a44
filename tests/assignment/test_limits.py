"""Costs at the limits of floats: huge, tiny, mixed, with sentinels; warm starts of any size; copies; proofs that close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import fastmatch as fm
from fastmatch.assignment import (
    Assignment,
    DenseShortlists,
    FactorCost,
    SmallDense,
    certificate,
    select_solver,
    solve_batched,
)


def totals(cost: np.ndarray, found: Assignment, maximize: bool = False) -> tuple[float, float]:
    """The exact totals of an assignment and of scipy's."""
    rows, cols = linear_sum_assignment(cost, maximize=maximize)
    wide = cost.astype(np.longdouble)
    return float(wide[found.row_ind, found.col_ind].sum()), float(wide[rows, cols].sum())


@pytest.mark.parametrize("solver", [None, SmallDense(), DenseShortlists()])
@pytest.mark.parametrize("shape", [(40, 40), (40, 43), (43, 40)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_largest_float_may_stand_for_forbidden(solver, shape, dtype):
    g = np.random.default_rng(0)
    cost = g.random(shape).astype(dtype)
    cost[g.random(shape) < 0.6] = np.finfo(dtype).max
    k = min(shape)
    cost[
        np.arange(k), g.permutation(max(shape))[:k] if shape[1] > shape[0] else g.permutation(shape[1])[:k]
    ] = 0.5
    found = fm.solve(cost, solver=solver)
    ours, theirs = totals(cost, found)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert found.is_certified
    gap, bound = certificate(cost, found)
    assert gap <= bound
    assert cost[fm.linear_sum_assignment(cost)].sum(dtype=np.longdouble) == pytest.approx(theirs, rel=1e-12)


def test_sentinels_that_must_be_used_are_used_as_rarely_as_possible():
    g = np.random.default_rng(1)
    largest = np.finfo(np.float64).max
    cost = np.where(g.random((30, 30)) < 0.97, largest / 64, g.random((30, 30)))
    cost[:2] = largest / 64
    found = fm.solve(cost)
    rows, cols = linear_sum_assignment(cost)
    assert (cost[found.row_ind, found.col_ind] > 1).sum() == (cost[rows, cols] > 1).sum()


def test_small_costs_beside_sentinels_decide_in_every_entry_point():
    g = np.random.default_rng(2)
    cost = np.outer(g.random(160), g.random(160)).astype(np.float32)
    cost[g.random(cost.shape) < 0.5] = np.float32(1.7e38)
    rows, cols = linear_sum_assignment(cost)
    best = cost[rows, cols].sum(dtype=np.float64)
    for pairs in (fm.linear_sum_assignment(cost), (np.arange(160), solve_batched(cost[None])[0])):
        assert cost[pairs].sum(dtype=np.float64) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("maximize", [False, True])
def test_costs_from_the_smallest_to_the_largest_float_in_one_matrix(maximize):
    g = np.random.default_rng(3)
    for n, m in ((12, 12), (9, 14), (14, 9)):
        cost = 10.0 ** g.uniform(-300, 300, (n, m))
        found = fm.solve(-cost if maximize else cost, maximize=maximize)
        ours, theirs = totals(cost, found)
        assert ours <= theirs * (1 + 1e-12)
        gap, bound = certificate(-cost if maximize else cost, found, maximize=maximize)
        assert gap <= bound


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e14, 1e300, 0.0, 1e-300])
@pytest.mark.parametrize(("n", "solver"), [(20, None), (1100, None), (1100, DenseShortlists())])
def test_a_warm_start_of_any_size_gives_the_optimum(scale, n, solver):
    g = np.random.default_rng(4)
    cost = g.random((n, n))
    first = fm.solve(g.random((n, n)))
    start = Assignment(first.row_ind, first.col_ind, first.u * scale, first.v * scale, 0.0, 0.0, 0.0)
    found = fm.solve(cost, warm_start=start, solver=solver)
    assert found.objective == pytest.approx(fm.solve(cost).objective, rel=1e-12)
    assert found.is_certified
    assert found.gap_bound < 1e-9


@pytest.mark.parametrize(("n", "solver"), [(50, None), (300, None), (1100, None), (1100, DenseShortlists())])
def test_gaps_of_sums_stay_below_their_bound(n, solver):
    for seed in range(3):
        g = np.random.default_rng(seed)
        cost = g.random((n, 1)) + g.random(n)
        found = fm.solve(cost, solver=solver)
        assert found.is_certified
        gap, bound = certificate(cost, found)
        assert gap <= bound


@pytest.mark.parametrize("copies", [2, 8])
@pytest.mark.parametrize("side", ["rows", "columns", "both"])
@pytest.mark.parametrize("solver", [None, DenseShortlists()])
def test_copies_of_rows_and_of_columns(copies, side, solver):
    g = np.random.default_rng(5)
    n = 1104
    cost = g.random((n, n))
    if side != "columns":
        cost = np.repeat(cost[: n // copies], copies, axis=0)[g.permutation(n)]
    if side != "rows":
        cost = np.repeat(cost[:, : n // copies], copies, axis=1)[:, g.permutation(n)]
    found = fm.solve(cost, solver=solver)
    ours, theirs = totals(cost, found)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert found.is_certified


def test_columns_that_differ_in_one_entry_are_not_copies():
    g = np.random.default_rng(6)
    n = 1104
    cost = np.repeat(g.integers(0, 9, (n, n // 4)).astype(np.float64), 4, axis=1)
    cost[g.integers(n, size=n), np.arange(n)] = -1.0
    found = fm.solve(cost, solver=DenseShortlists())
    ours, theirs = totals(cost, found)
    assert ours == theirs


def test_factor_costs_with_copied_units_go_to_their_matrix():
    g = torch.Generator().manual_seed(7)
    n = 4112  # beyond 2^24 entries
    a, b = torch.randn(n // 2, 4, generator=g), torch.randn(n // 2, 4, generator=g)
    a, b = a.repeat_interleave(2, 0), b.repeat_interleave(2, 0)[torch.randperm(n, generator=g)]
    found = fm.solve(FactorCost([(a, b)]), maximize=True)
    assert found.stats["solver"] == "DenseShortlists"
    assert found.is_certified
    exact = a.double() @ b.double().T
    assert found.objective == pytest.approx(float(exact[found.row_ind, found.col_ind].sum()), rel=1e-12)


def test_stacks_of_huge_costs():
    g = np.random.default_rng(8)
    stack = g.random((3, 12, 12)) * np.array([1.0, 1.7e308, 1e-300])[:, None, None]
    for cost, cols in zip(stack, solve_batched(stack), strict=True):
        assert (cols == linear_sum_assignment(cost)[1]).all()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_solve_that_gives_way_reads_nothing_that_it_did_not_write(monkeypatch, maximize):
    """Memory that was not written may hold signalling NaNs, at whose arithmetic numpy warns."""
    cost = np.full((40, 40), np.finfo(float).max)
    cost[:, :20] = np.random.default_rng(0).random((40, 20))
    expected = fm.solve(cost, maximize=maximize)
    empty, signalling = np.empty, np.uint64(0x7FF0000000000001)

    def poisoned(shape, dtype=float, **given):
        made = empty(shape, dtype, **given)
        if made.dtype == float:
            made.view(np.uint64).fill(signalling)
        return made

    monkeypatch.setattr(np, "empty", poisoned)
    found = fm.solve(cost, maximize=maximize)
    monkeypatch.undo()
    assert found.objective == expected.objective
    assert (found.col_ind == expected.col_ind).all()


@pytest.mark.parametrize("shape", [(30, 40), (142, 394), (300, 300)])
@pytest.mark.parametrize("solver", [None, DenseShortlists()])
def test_sums_beyond_what_needs_no_factor_for_single_entries(solver, shape):
    """The first rows alone add up to more than 2^940, where no entry is so large: all rows are read."""
    cost = np.random.default_rng(0).uniform(0.5, 1, shape) * 2.0**936
    found = fm.solve(cost, solver=solver)
    rows, columns = linear_sum_assignment(cost * 2.0**-936)
    assert found.objective * 2.0**-936 == pytest.approx((cost[rows, columns] * 2.0**-936).sum(), rel=1e-12)
    assert found.is_certified


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("solver", [None, DenseShortlists()])
def test_sentinels_in_a_nearly_square_matrix_do_not_hide_small_costs(transposed, seed, solver):
    """Its duals are those of a square matrix, moved by one that is as large as a sentinel."""
    g = np.random.default_rng(seed)
    n, m = 200, 201
    costs = g.standard_normal((n, 1)) + g.standard_normal(m)
    cost = np.where(g.random((n, m)) < 0.95, 1.7e38, costs).astype(np.float32)
    possible = np.arange(n), g.permutation(m)[:n]
    cost[possible] = costs[possible]
    cost = cost.T if transposed else cost
    found = fm.solve(cost, solver=solver)
    ours, theirs = totals(cost, found)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert found.is_certified
    assert found.gap_bound < 1e-9 * np.abs(costs).sum()
    assert cost[fm.linear_sum_assignment(cost)].sum(dtype=np.float64) == pytest.approx(theirs, rel=1e-9)


def outer_products_with_sentinels(seed: int, n: int, m: int) -> np.ndarray:
    """Return costs a_i * b_j, seven tenths of which are 1e20; an assignment without these exists."""
    g = np.random.default_rng(seed)
    cost = g.random((n, 1)) * g.random((1, m))
    large = g.random((n, m)) < 0.7
    large[np.arange(n), g.permutation(m)[:n]] = False
    return np.where(large, 1e20, cost)


@pytest.mark.parametrize(("seed", "n", "m", "zeros"), [(11847, 47, 48, 0), (2794, 48, 48, 2)])
def test_other_first_duals_that_match_every_row_are_proved_too(seed, n, m, zeros):
    cost = outer_products_with_sentinels(seed, n, m)
    cost[n - zeros :] = 0
    best = totals(cost, fm.solve(cost))[1]
    assert fm.solve(cost).objective == pytest.approx(best)
    assert cost[fm.linear_sum_assignment(cost)].sum() == pytest.approx(best)
    cols = solve_batched(cost[None])[0]
    assert cost[np.arange(n), cols].sum() == pytest.approx(best)


def test_a_sentinel_that_no_row_needs_makes_no_large_dual():
    g = np.random.default_rng(0)
    n = 64
    cost = np.where(g.random((n, n)) < 0.97, 1e9, g.random((n, n)))
    cost[np.arange(n), g.permutation(n)] = g.random(n)
    found = fm.solve(cost)
    assert found.objective < n
    assert max(np.abs(found.u).max(), np.abs(found.v).max()) < 1e6
    assert found.gap_bound < 1e-12 * n


@pytest.mark.parametrize(("cost", "error"), [
    (np.zeros(3), ValueError), (np.full((40, 40), np.nan), ValueError), (np.full((3, 3), np.nan), ValueError),
    (np.full((3, 3), np.inf), ValueError), (np.array([["a"]]), TypeError), (torch.zeros(3), ValueError),
])  # fmt: skip
def test_the_function_of_scipy_names_its_own_argument(cost, error):
    with pytest.raises(error, match=r"^cost_matrix\b"):
        fm.linear_sum_assignment(cost)


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("large", [2.0**31, 2.0**50])
@pytest.mark.parametrize("turn", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("solver", [None, DenseShortlists()])
def test_a_row_of_large_entries_hides_no_gap(seed, large, turn, solver):
    """Its dual is as large, and small costs were lost in the rounding of the proof."""
    cost = np.random.default_rng(seed).integers(0, 1000, (1100, 1100)).astype(np.float64)
    cost[-1] = large + 1
    cost[-1, -1] = large
    cost = np.ascontiguousarray(cost.T) if turn else cost
    for given, maximize in ((cost, False), (-cost, True)):
        found = fm.solve(given, maximize=maximize, solver=solver)
        assert found.is_certified
        rows, cols = linear_sum_assignment(given, maximize=maximize)
        assert found.objective == pytest.approx(given[rows, cols].sum(), rel=1e-15)
        gap, bound = certificate(given, found, maximize=maximize)
        assert gap <= bound


def test_the_solver_of_integers_beyond_float64_is_named():
    assert type(select_solver(np.array([[2**60, 1], [3, 4]]))).__name__ == "SmallDense"
    assert type(select_solver(np.full((2900, 2900), 2**60))).__name__ == "DenseShortlists"
