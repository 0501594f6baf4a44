"""The assignment engine: scipy's objective, its own certificate, and what must not change the answer."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_lsa

from bench.lib.problems import KINDS, problem
from fastmatch.assignment import (
    DenseCost,
    DenseShortlists,
    DeviceCost,
    FactorCost,
    LapJV,
    LapProblem,
    SmallDense,
    certificate,
    linear_sum_assignment,
    select_solver,
    solve,
)
from fastmatch.assignment.bounded_gain import BoundedGain, multiply
from fastmatch.assignment.shortest_paths import ShortestPaths
from fastmatch.assignment.solve import SMALL
from helpers.costs import check_rows
from helpers.networks import fresh_seed


def exact(cost: np.ndarray, rows, cols) -> float:
    return math.fsum(float(x) for x in cost[rows, cols])


def check(cost: np.ndarray, maximize: bool = False, **options):
    """Prove what is found, of a small matrix by both solvers; return the solution of DenseShortlists."""
    if not isinstance(select_solver(cost), DenseShortlists):
        assert prove(cost, maximize, **options).stats["solver"] in ("SmallDense", "none")
    return prove(cost, maximize, solver=DenseShortlists(), **options)


def prove(cost: np.ndarray, maximize: bool, **options):
    """Solve, compare with scipy in float64, and prove the result by both certificates."""
    found = solve(cost, maximize=maximize, **options)
    n, m = cost.shape
    assert len(found.row_ind) == len(found.col_ind) == min(n, m)
    assert (np.diff(found.row_ind) > 0).all()
    assert len(np.unique(found.col_ind)) == min(n, m)
    double = cost.astype(np.float64)
    best = exact(double, *scipy_lsa(double, maximize))
    value = exact(double, found.row_ind, found.col_ind)
    size = math.fsum(abs(float(x)) for x in double[found.row_ind, found.col_ind])
    assert abs(value - best) <= 1e-12 * size + found.gap_bound
    assert found.objective == pytest.approx(value, rel=1e-12, abs=1e-300)
    assert found.gap <= found.gap_bound
    gap, bound = certificate(cost, found, maximize=maximize)
    assert -bound <= gap <= bound
    slack = (double - found.u[:, None] - found.v[None, :]) * (-1 if maximize else 1)
    if np.isfinite(double).all() and slack.size:
        assert slack.min() >= -1e-9 * (np.abs(double).max() + np.abs(found.u).max() + np.abs(found.v).max())
    return found


def random_problem(g: np.random.Generator, largest: int) -> tuple[np.ndarray, bool, str]:
    kind = list(KINDS)[g.integers(len(KINDS))]
    n = int(g.integers(0, largest + 1))
    m = n if g.random() < 0.6 else int(g.integers(0, largest + 1))
    cost = problem(kind, n, m, int(g.integers(2**31)))
    if g.random() < 0.3:
        cost = -cost
    if g.random() < 0.2:
        cost = np.asfortranarray(cost)
    if g.random() < 0.1:
        cost = cost[::-1, ::-1]
    return cost, bool(g.random() < 0.5), f"{kind} {n} x {m}"


def run_random(count: int, largest: int) -> None:
    g = np.random.default_rng(fresh_seed())
    for k in range(count):
        cost, maximize, name = random_problem(g, largest)
        try:
            check(cost, maximize)
        except AssertionError as error:
            raise AssertionError(f"problem {k}, {name}, maximize={maximize}") from error


@pytest.mark.parametrize("part", range(4))
def test_random_problems(part):
    run_random(600, 60)


def test_larger_random_problems():
    run_random(150, 200)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_random_problems(part):
    run_random(4500, 60)
    run_random(500, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_a_size_that_takes_every_step(kind):
    found = check(problem(kind, 500, seed=fresh_seed()))
    assert found.stats["solver"] == "DenseShortlists"


@pytest.mark.parametrize("kind", ["gaussian", "log-normal 8", "ties", "dead", "integers near 2^24"])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (200, 260)])
@pytest.mark.parametrize("solver", [DenseShortlists(), SmallDense()])
def test_what_must_not_change_the_objective(kind, n, m, solver):
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    cost = problem(kind, n, m, seed).astype(np.float64)
    value = check(cost).objective
    close = {"rel": 1e-12, "abs": 1e-9}
    assert solve(cost[g.permutation(n)][:, g.permutation(m)], solver=solver).objective == pytest.approx(
        value, **close
    )
    assert solve(cost.T, solver=solver).objective == pytest.approx(value, **close)
    assert solve(-cost, maximize=True, solver=solver).objective == pytest.approx(-value, **close)
    assert solve(cost * 1024.0, solver=solver).objective == pytest.approx(value * 1024, **close)
    rows, cols = g.integers(-9, 9, n), g.integers(-9, 9, m)
    shifted = solve(cost + rows[:, None], solver=solver).objective - (rows.sum())
    assert shifted == pytest.approx(value, rel=1e-9, abs=1e-6)
    if n == m:
        assert solve(cost + cols[None], solver=solver).objective - cols.sum() == pytest.approx(
            value, rel=1e-9, abs=1e-6
        )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45), (45, 30), (200, 200)])
@pytest.mark.parametrize("solver", [DenseShortlists(), SmallDense()])
def test_forbidden_entries(n, m, maximize, solver):
    g = np.random.default_rng(fresh_seed())
    worst = -np.inf if maximize else np.inf
    for share in (0.1, 0.5, 0.9):
        cost = g.standard_normal((n, m)).astype(np.float32)
        cost[g.random((n, m)) < share] = worst
        side = np.arange(min(n, m))
        cost[side, g.permutation(max(n, m))[: len(side)] if n <= m else side] = 5.0
        if n > m:
            cost[g.permutation(n)[: len(side)], side] = 5.0
        found = solve(cost, maximize=maximize, solver=solver)
        best = exact(cost, *scipy_lsa(cost, maximize))
        assert found.objective == pytest.approx(best, rel=1e-6)
        assert found.gap <= found.gap_bound
    for infeasible in (np.full((n, m), worst), np.where(np.arange(m) < 2, 1.0, worst) * np.ones((n, 1))):
        with pytest.raises(ValueError, match="no assignment avoids the forbidden"):
            solve(infeasible, maximize=maximize, solver=solver)


@pytest.mark.parametrize("value", [-9.0, -1.0, 0.0, 9.0])
@pytest.mark.parametrize(
    "dead", [(60, 10), (10, 60), (90, 0), (0, 90), (30, 30), (100, 99), (100, 100), (1, 50)]
)
def test_dead_units_of_unequal_number(dead, value):
    """Dead ones may be worse or better than what the live ones have; they are cut out and brought back."""
    g = np.random.default_rng(fresh_seed())
    n = 100
    for _ in range(3):
        cost = g.standard_normal((n, n)).astype(np.float32)
        cost[g.permutation(n)[: dead[0]]] = value
        cost[:, g.permutation(n)[: dead[1]]] = value
        if g.random() < 0.5 and min(dead) < n:  # what is better than the dead ones is rare
            cost[g.integers(n), g.integers(n)] = -20.0
        check(cost)
        check(-cost, maximize=True)


def test_bad_input():
    nan = np.ones((3, 3))
    nan[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        solve(nan)
    with pytest.raises(ValueError, match="holds -inf"):
        solve(np.array([[1.0, -np.inf], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"holds \+inf"):
        solve(np.array([[1.0, np.inf], [0.0, 1.0]]), maximize=True)
    with pytest.raises(ValueError, match="expected a matrix, got 1 dimensions"):
        solve(np.ones(3))
    with pytest.raises(TypeError, match="complex"):
        solve(np.ones((2, 2), complex))
    with pytest.raises(TypeError, match="solver: expected a solver object"):
        solve(np.ones((2, 2)), solver="fast")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"solver: got the class LapJV; write LapJV\(\)"):
        solve(np.ones((2, 2)), solver=LapJV)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="warm_start: expected an Assignment, got str"):
        solve(np.ones((3, 3)), warm_start="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warm_start: expected 3 duals"):
        solve(np.ones((3, 3)), warm_start=solve(np.ones((2, 2))))
    broken = solve(np.ones((3, 3)))
    with pytest.raises(ValueError, match="not a complete matching"):
        certificate(
            np.ones((3, 3)), type(broken)(broken.row_ind, np.zeros(3, int), broken.u, broken.v, 0, 0, 0)
        )


def test_the_certificate_can_fail():
    cost = problem("gaussian", 50, seed=fresh_seed())
    found = solve(cost)
    swapped = found.col_ind.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    wrong = type(found)(found.row_ind, swapped, found.u, found.v, 0.0, 0.0, 0.0)
    gap, bound = certificate(cost, wrong)
    assert gap > bound
    assert gap == pytest.approx(exact(cost, wrong.row_ind, swapped) - found.objective, abs=1e-6)


def test_torch_and_dtypes():
    g = np.random.default_rng(fresh_seed())
    base = torch.from_numpy(g.integers(-90, 90, (60, 60)))
    best = scipy_lsa(base.numpy())
    value = int(base[best].sum())
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
    ):
        cost = base.to(dtype)
        rows, cols = linear_sum_assignment(cost_matrix=cost)  # by scipy's name
        assert rows.dtype == cols.dtype == torch.int64
        assert int(base[rows, cols].sum()) == value
        assert solve(cost.T).objective == value
    doubles = np.array([[1.0, 1.0 + 1e-12], [1.0, 1.0]])
    assert linear_sum_assignment(doubles, maximize=True)[1].tolist() == [1, 0]
    big = np.array([[2**53 - 1, 2**53 - 2], [2**53 - 3, 2**53 - 3]])
    assert linear_sum_assignment(big)[1].tolist() == [1, 0]
    swapped = problem("gaussian", 20).astype(">f8")
    assert solve(swapped).objective == pytest.approx(exact(swapped, *scipy_lsa(swapped)), rel=1e-12)


def test_the_input_is_left_alone_and_not_copied():
    for cost in (problem("dead", 300), np.asfortranarray(problem("dead", 300))):
        before = cost.copy()
        cost.flags.writeable = False
        for solver in (DenseShortlists(), SmallDense()):
            solve(cost, solver=solver)
            solve(cost, maximize=True, solver=solver)
        assert np.array_equal(cost, before)
    for view in (DenseCost(cost), DenseCost(cost.T)):
        given = view.T if view.is_column_major else view
        assert np.shares_memory(LapProblem(given, 1.0).matrix(None), cost)


@pytest.mark.parametrize("kind", ["gaussian", "log-normal 32", "ties", "dead"])
@pytest.mark.parametrize("solver", [DenseShortlists(), SmallDense()])
def test_warm_equals_cold(kind, solver):
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    cost = problem(kind, 400, seed=seed)
    cold = solve(cost, solver=solver)
    again = solve(cost, warm_start=cold, solver=solver)
    assert again.objective == pytest.approx(cold.objective, rel=1e-12)
    changed = cost + (g.random(cost.shape) < 0.01) * g.standard_normal(cost.shape).astype(np.float32)
    warm = solve(changed, warm_start=cold, solver=solver)
    assert warm.gap <= warm.gap_bound
    assert warm.objective == pytest.approx(solve(changed, solver=solver).objective, rel=1e-12)
    turned = solve(-changed.T, maximize=True, solver=solver)
    again = solve(-changed.T, maximize=True, warm_start=turned, solver=solver)
    assert again.objective == pytest.approx(turned.objective)


def test_a_planted_permutation_of_a_large_problem():
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    rows = g.standard_normal((3000, 24), np.float32)
    planted = g.permutation(3000)
    _, cols = linear_sum_assignment(rows @ rows[planted].T - 0.5 * (rows[planted] ** 2).sum(1), maximize=True)
    assert np.array_equal(planted[cols], np.arange(3000))


def test_methods_agree():
    cost = problem("gaussian", 120, seed=fresh_seed())
    assert select_solver(cost) == SmallDense(hands_over=True)
    assert select_solver(np.broadcast_to(0.0, (1, SMALL))) == SmallDense(hands_over=True)
    assert select_solver(np.broadcast_to(0.0, (1, SMALL + 1))) == DenseShortlists()
    assert solve(cost, solver=SmallDense()).objective == pytest.approx(solve(cost).objective, rel=1e-12)


def test_the_package_lapjv_as_a_solver():
    pytest.importorskip("lapjv", reason="it has no wheel for this version of Python")
    cost = problem("gaussian", 120, seed=fresh_seed())
    reference = solve(cost, solver=LapJV())
    assert reference.stats["solver"] == "LapJV"
    assert solve(cost, solver=DenseShortlists()).objective == pytest.approx(reference.objective, rel=1e-6)
    assert solve(cost[:1, :1], solver=LapJV()).col_ind.tolist() == [0]
    whole = np.random.default_rng(fresh_seed()).integers(-1000, 1000, (12, 12))
    assert solve(whole, solver=LapJV()).objective == solve(whole).objective
    with pytest.raises(ValueError, match="square"):
        solve(np.ones((2, 3)), solver=LapJV())


@pytest.mark.parametrize("solver", [DenseShortlists(), SmallDense()])
def test_two_threads_do_not_share_state(solver):
    costs = [problem("gaussian", 400, seed=k) for k in range(4)]
    alone = [solve(c, solver=solver).objective for c in costs]
    together: list[float] = [0.0] * 4

    def work(k: int) -> None:
        together[k] = solve(costs[k], solver=solver).objective

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert together == alone


def test_the_interpreter_lock_is_released():
    cost = problem("log-normal 8", 1500)
    solve(cost[:50, :50])
    ticks, done = 0, threading.Event()

    def work() -> None:
        solve(cost)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    assert ticks > 5  # this thread went on meanwhile


def test_a_cost_of_your_own():
    """A class with the members of Cost is solved by candidate lists and certified."""

    class Own:
        def __init__(self, matrix: np.ndarray) -> None:
            self.dense, self.shape = DenseCost(matrix), matrix.shape
            self.row_topk, self.row_min = self.dense.row_topk, self.dense.row_min
            self.entries, self.entry_error = self.dense.entries, self.dense.entry_error

        @property
        def T(self):
            return Own(self.dense.matrix.T)

    matrix = problem("gaussian64", 300, 240, seed=fresh_seed())
    for cost in (matrix, matrix[:, :240], matrix[:240]):
        found = solve(Own(cost), maximize=True)
        assert found.stats["solver"] == "CandidateLists"
        assert found.objective == pytest.approx(cost[scipy_lsa(cost, True)].sum(), rel=1e-12)
        gap, bound = certificate(Own(cost), found, maximize=True)
        assert -bound <= gap <= bound
        assert found.is_certified
        assert "certified, by CandidateLists" in repr(found)
        assert found.dual_objective == pytest.approx(found.objective, rel=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "ties", "signed zeros"])
def test_rows_of_a_dense_cost(kind):
    g = np.random.default_rng(fresh_seed())
    values = problem(kind, 23, 60, seed=fresh_seed())
    cost, v = DenseCost(values), g.standard_normal(60)
    check_rows(cost, values, v)


def test_solvers_and_schedules_check_their_options():
    from fastmatch.assignment import CandidateLists, DenseSchedule, ListSchedule, SmallSchedule

    for bad, match in (
        (lambda: CandidateLists(length=0), "length: expected a whole number of at least 1; got 0"),
        (lambda: CandidateLists(batch_rows=2.5), "batch_rows: expected a whole number"),  # type: ignore[arg-type]
        (lambda: DenseSchedule(short_eps=-1.0), "schedule.short_eps: expected a finite number"),
        (lambda: DenseSchedule(short_bids=0.5), "schedule.short_bids: expected a whole number"),  # type: ignore[arg-type]
        (lambda: ListSchedule(lower_factor=1.0), "schedule.lower_factor: expected a finite number above 1"),
        (lambda: SmallDense(SmallSchedule(phases=-1)), "schedule.phases: expected a whole number"),
        (lambda: DenseSchedule(war_above=1.5), "schedule.war_above: expected a number from 0 to 1"),
        (lambda: DenseSchedule(short_leaves=2.0), "schedule.short_leaves: expected a number from 0 to 1"),
        (lambda: DenseSchedule(copied_below=2.0), "schedule.copied_below: expected a number from 0 to 1"),
        (
            lambda: SmallDense(SmallSchedule(auction_above=2.0)),
            "schedule.auction_above: expected a number from 0",
        ),
        (
            lambda: ListSchedule(last_temperature=0.0),
            "schedule.last_temperature: expected a finite number above 0",
        ),
        (
            lambda: ListSchedule(first_temperature=0.001),
            "schedule.last_temperature: expected at most first_temp",
        ),
        (
            lambda: ListSchedule(temperatures=0),
            "schedule.temperatures: expected a whole number of at least 1",
        ),
        (
            lambda: ListSchedule(relaxation=2.0),
            "schedule.relaxation: expected a number between 0 and 2; got 2.0",
        ),
        (lambda: ListSchedule(relaxation=0.0), "schedule.relaxation: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    for solver, schedule, match in (
        (CandidateLists, DenseSchedule(), "schedule: expected a ListSchedule, got DenseSchedule"),
        (DenseShortlists, DenseSchedule, "schedule: expected a DenseSchedule, got the class DenseSchedule"),
        (SmallDense, None, "schedule: expected a SmallSchedule, got NoneType"),
    ):
        with pytest.raises(TypeError, match=match):
            solver(schedule=schedule)


@pytest.mark.parametrize("solver", [None, SmallDense(), DenseShortlists(), ShortestPaths()], ids=repr)
def test_every_solver_of_matrices_computes_that_of_factors(solver):
    g = np.random.default_rng(fresh_seed())
    a, b = g.random((30, 4)), g.random((40, 4))
    found = solve(FactorCost([(a, b)]), maximize=True, solver=solver)
    assert found.is_certified
    assert found.objective == pytest.approx(solve(a @ b.T, maximize=True).objective, rel=1e-12)


def test_a_solver_of_matrices_refuses_bounds():
    units = torch.randn(600, 300, generator=torch.Generator().manual_seed(fresh_seed()))
    gain = multiply([(units, units)])
    assert isinstance(gain, BoundedGain)
    with pytest.raises(ValueError, match="SmallDense takes a matrix, not a BoundedGain"):
        solve(gain, maximize=True, solver=SmallDense())


def test_a_solver_that_declines_a_matrix_leaves_it_to_shortlists():
    class Picky:
        def solve(self, problem):
            return None

    matrix = np.random.default_rng(fresh_seed()).random((30, 20))
    for cost in (matrix, DeviceCost(torch.from_numpy(matrix))):
        found = solve(cost, maximize=True, solver=Picky())
        assert found.stats["solver"] == "DenseShortlists"
        assert found.objective == pytest.approx(matrix[scipy_lsa(matrix, True)].sum(), rel=1e-12)
    with pytest.raises(ValueError, match="solver: Picky does not solve this FactorCost"):
        solve(FactorCost([(np.ones((3, 2)), np.ones((3, 2)))]), solver=Picky())
