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
from fastmatch.assignment import certificate, linear_sum_assignment, select_method, solve
from fastmatch.assignment.small_dense import SMALL
from helpers.networks import fresh_seed


def exact(cost: np.ndarray, rows, cols) -> float:
    return math.fsum(float(x) for x in cost[rows, cols])


def check(cost: np.ndarray, maximize: bool = False, **options):
    """Proves what is found; a small matrix is given to both solvers. Returns the one of lists."""
    if select_method(cost) != "shortlist":
        assert prove(cost, maximize, **options).stats["method"] in ("rows", "none")
    return prove(cost, maximize, method="shortlist", **options)


def prove(cost: np.ndarray, maximize: bool, **options):
    """Solves, compares with scipy in float64, and proves the result by both certificates."""
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
    assert found.stats["method"] == "shortlist"


@pytest.mark.parametrize("kind", ["gaussian", "log-normal 8", "ties", "dead", "integers near 2^24"])
@pytest.mark.parametrize(("n", "m"), [(300, 300), (200, 260)])
@pytest.mark.parametrize("method", ["shortlist", "rows"])
def test_what_must_not_change_the_objective(kind, n, m, method):
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    cost = problem(kind, n, m, seed).astype(np.float64)
    value = check(cost).objective
    close = {"rel": 1e-12, "abs": 1e-9}
    assert solve(cost[g.permutation(n)][:, g.permutation(m)], method=method).objective == pytest.approx(
        value, **close
    )
    assert solve(cost.T, method=method).objective == pytest.approx(value, **close)
    assert solve(-cost, maximize=True, method=method).objective == pytest.approx(-value, **close)
    assert solve(cost * 1024.0, method=method).objective == pytest.approx(value * 1024, **close)
    rows, cols = g.integers(-9, 9, n), g.integers(-9, 9, m)
    shifted = solve(cost + rows[:, None], method=method).objective - (rows.sum())
    assert shifted == pytest.approx(value, rel=1e-9, abs=1e-6)
    if n == m:
        assert solve(cost + cols[None], method=method).objective - cols.sum() == pytest.approx(
            value, rel=1e-9, abs=1e-6
        )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45), (45, 30), (200, 200)])
@pytest.mark.parametrize("method", ["shortlist", "rows"])
def test_forbidden_entries(n, m, maximize, method):
    g = np.random.default_rng(fresh_seed())
    worst = -np.inf if maximize else np.inf
    for share in (0.1, 0.5, 0.9):
        cost = g.standard_normal((n, m)).astype(np.float32)
        cost[g.random((n, m)) < share] = worst
        side = np.arange(min(n, m))
        cost[side, g.permutation(max(n, m))[: len(side)] if n <= m else side] = 5.0
        if n > m:
            cost[g.permutation(n)[: len(side)], side] = 5.0
        found = solve(cost, maximize=maximize, method=method)
        best = exact(cost, *scipy_lsa(cost, maximize))
        assert found.objective == pytest.approx(best, rel=1e-6)
        assert found.gap <= found.gap_bound
    for infeasible in (np.full((n, m), worst), np.where(np.arange(m) < 2, 1.0, worst) * np.ones((n, 1))):
        with pytest.raises(ValueError, match="no assignment avoids the forbidden"):
            solve(infeasible, maximize=maximize, method=method)


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
    with pytest.raises(ValueError, match="beyond 2"):
        solve(np.array([[2**60, 1], [1, 2**60 + 1]]))
    with pytest.raises(ValueError, match="method: expected one of"):
        solve(np.ones((2, 2)), method="fast")
    with pytest.raises(ValueError, match="warm_start: expected 3 duals"):
        solve(np.ones((3, 3)), warm_start=solve(np.ones((2, 2))))
    with pytest.raises(ValueError, match="square"):
        solve(np.ones((2, 3)), method="lapjv")
    broken = solve(np.ones((3, 3)))
    with pytest.raises(ValueError, match="no complete matching"):
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
        rows, cols = linear_sum_assignment(cost)
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
        for method in ("shortlist", "rows"):
            solve(cost, method=method)
            solve(cost, maximize=True, method=method)
        assert np.array_equal(cost, before)
    from fastmatch.assignment.solve import prepare

    for view in (cost, cost.T):
        matrix, _ = prepare(view)
        assert np.shares_memory(matrix, cost)


@pytest.mark.parametrize("kind", ["gaussian", "log-normal 32", "ties", "dead"])
@pytest.mark.parametrize("method", ["shortlist", "rows"])
def test_warm_equals_cold(kind, method):
    seed = fresh_seed()
    g = np.random.default_rng(seed)
    cost = problem(kind, 400, seed=seed)
    cold = solve(cost, method=method)
    again = solve(cost, warm_start=cold, method=method)
    assert again.objective == pytest.approx(cold.objective, rel=1e-12)
    changed = cost + (g.random(cost.shape) < 0.01) * g.standard_normal(cost.shape).astype(np.float32)
    warm = solve(changed, warm_start=cold, method=method)
    assert warm.gap <= warm.gap_bound
    assert warm.objective == pytest.approx(solve(changed, method=method).objective, rel=1e-12)
    turned = solve(-changed.T, maximize=True, method=method)
    again = solve(-changed.T, maximize=True, warm_start=turned, method=method)
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
    assert select_method(cost) == ("rows" if cost.size <= SMALL else "shortlist")
    assert solve(cost, method="rows").objective == pytest.approx(solve(cost).objective, rel=1e-12)
    reference = solve(cost, method="lapjv")
    assert reference.stats["method"] == "lapjv"
    assert solve(cost, method="shortlist").objective == pytest.approx(reference.objective, rel=1e-6)
    assert solve(cost[:1, :1], method="lapjv").col_ind.tolist() == [0]


@pytest.mark.parametrize("method", ["shortlist", "rows"])
def test_two_threads_do_not_share_state(method):
    costs = [problem("gaussian", 400, seed=k) for k in range(4)]
    alone = [solve(c, method=method).objective for c in costs]
    together: list[float] = [0.0] * 4

    def work(k: int) -> None:
        together[k] = solve(costs[k], method=method).objective

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
