"""Solve a random problem and say what is wrong with the result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from scipy.optimize import linear_sum_assignment as scipy_lsa

from fastmatch.assignment import (
    Assignment,
    FactorCost,
    certificate,
    linear_sum_assignment,
    solve,
    solve_batched,
)
from helpers.fuzz.problems import Problem, warm_start

TIMES = 10.0
"""Processor time of scipy's solver up to which ours may take."""

EPS = float(np.finfo(np.float64).eps)

FLOOR = 0.02
"""Seconds that ours may take whatever scipy's takes."""

Pairs = tuple[np.ndarray, np.ndarray]
Finding = tuple[str, str]


def exact(values: np.ndarray) -> Fraction | float:
    """Return the exact sum; infinity if an entry is infinite."""
    numbers = values.tolist()
    if math.inf in numbers:
        return math.inf
    return sum(map(Fraction, numbers), Fraction(0))


def separated(base: np.ndarray) -> np.ndarray | None:
    """Return the matrix with a far largest finite value, as sentinels are, lowered to just above all others' sums.

    Its optimum uses the fewest sentinels, and among those assignments the cheapest. None if there is no such value.
    """
    finite = base[np.isfinite(base)]
    top = finite.max(initial=-math.inf)
    rest = finite[finite < top]
    if not rest.size:
        return None
    low, high = float(rest.min()), float(rest.max())
    lowered = high + (2 * min(base.shape) + 2) * (high - low) + 1e-300
    return np.where(base == top, lowered, base) if math.isfinite(lowered) and lowered < top / 2 else None


def reference(problem: Problem) -> tuple[list[Pairs], float]:
    """Return assignments that the optimum is at least as good as, and scipy's processor time."""
    base = problem.base
    largest = np.abs(np.where(np.isfinite(base), base, 0)).max(initial=0)
    if largest > 1e290:  # scipy's sums would overflow
        base = np.ldexp(base, -100)
    start = time.process_time()
    found = [scipy_lsa(base)]
    taken = time.process_time() - start
    lowered = separated(base)
    if lowered is not None:
        found.append(scipy_lsa(lowered))
    return found, taken


def judge(problem: Problem, seed: int) -> Iterator[float | Finding]:
    """Yield scipy's processor time before ours begins, then what is wrong: (kind, detail)."""
    references, theirs = reference(problem)
    yield theirs
    try:
        warm = warm_start(problem, seed)
        start = time.process_time()
        found, pairs = answer(problem, warm)
        taken = time.process_time() - start
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        if not any(word in told for word in problem.may_refuse):
            yield "raised", told[:200]
        return
    fault = invalid(problem, pairs)
    if fault:
        yield "no matching", fault
        return
    value = exact(entries(problem, pairs))
    best = min(exact(entries(problem, other)) for other in references)
    sizes = sum(map(abs, map(Fraction, entries(problem, pairs).tolist())), Fraction(0))
    size = float(min(sizes, Fraction(1e308)))
    if value - best > tolerance(problem, sizes):
        proved = found is not None and found.gap <= found.gap_bound
        above = float(value - best) if value - best < 10**308 else math.inf
        yield "wrong, and said to be proved" if proved else "wrong", f"{above} above, of {size}"
    if problem.solver is None and taken > FLOOR + TIMES * theirs:
        start = time.process_time()
        answer(problem, warm)  # kernels may have been compiled the first time
        taken = min(taken, time.process_time() - start)
        if taken > FLOOR + TIMES * theirs:
            yield "slow", f"{taken:.3f} s, scipy {theirs:.3f} s"
    if found is not None:
        yield from unproved(problem, found, value, size)


def unproved(problem: Problem, found: Assignment, value: Fraction, size: float) -> Iterator[Finding]:
    """Yield what is wrong with the proof: the gap, its bound, the duals, the objective, the certificate."""
    base = problem.base
    largest = float(np.abs(np.where(np.isfinite(base), base, 0)).max(initial=0))
    if largest > np.finfo(np.float64).max / (8 * max(1, sum(base.shape))):
        return  # sums overflow, so that no bound is finite
    if not (math.isfinite(found.gap_bound) and np.isfinite(found.u).all() and np.isfinite(found.v).all()):
        yield "no proof", f"gap {found.gap}, bound {found.gap_bound}, or duals that are not finite"
        return
    if not found.gap <= found.gap_bound:
        yield "gap above its bound", f"{found.gap} > {found.gap_bound}"
    objective = -found.objective if problem.maximize else found.objective
    rounding = Fraction(1e-11) * Fraction(size) + Fraction(EPS) * sum(base.shape) * Fraction(problem.scale)
    if abs(Fraction(objective) - value) > rounding:
        yield "objective", f"{found.objective}, exactly {float(value)} in the minimum's sense"
    gap, bound = certificate(problem.cost, found, maximize=problem.maximize)
    if not -bound <= gap <= bound:
        yield "certificate above its bound", f"{gap} against {bound}"


def tolerance(problem: Problem, sizes: Fraction) -> Fraction:
    """Return how far above the best known value a result may be, whose entries' sizes sum to ``sizes``.

    Nothing for integers. Otherwise a share of those sizes, and the rounding that nobody avoids.
    """
    if isinstance(problem.cost, np.ndarray) and problem.cost.dtype.kind in "iub":
        return Fraction(0)
    return Fraction(1e-9) * sizes + Fraction(EPS) * sum(problem.base.shape) * Fraction(problem.scale)


def entries(problem: Problem, pairs: Pairs) -> np.ndarray:
    """Return the matched entries as they are minimized: exact Python numbers for integers beyond 2^53."""
    if isinstance(problem.cost, FactorCost):
        return problem.base[pairs]
    matched = problem.cost[pairs].astype(object)
    return -matched if problem.maximize else matched


def answer(problem: Problem, warm: Assignment | None) -> tuple[Assignment | None, Pairs]:
    """Return the Assignment (None if the way has none) and the pairs."""
    cost, maximize = problem.cost, problem.maximize
    if problem.way == "linear_sum_assignment":
        return None, linear_sum_assignment(cost, maximize)
    if problem.way == "solve_batched":
        columns = solve_batched(np.stack([cost, cost]), maximize)[1]
        rows = np.flatnonzero(columns >= 0)
        return None, (rows, columns[rows])
    solver = None if problem.solver is None else problem.solver()
    found = solve(cost, maximize=maximize, warm_start=warm, solver=solver)
    return found, (found.row_ind, found.col_ind)


def invalid(problem: Problem, pairs: Pairs) -> str:
    """Return why the pairs are no matching of the shorter side; "" if they are one."""
    rows, columns = pairs
    n, m = problem.base.shape
    k = min(n, m)
    if len(rows) != k or len(columns) != k:
        return f"{len(rows)} rows, {len(columns)} columns"
    if k and not (rows.min() >= 0 and columns.min() >= 0 and rows.max() < n and columns.max() < m):
        return "indices out of range"
    if (np.diff(rows) <= 0).any() or len(np.unique(columns)) != k:
        return "rows not ascending, or a column twice"
    return "" if np.isfinite(problem.base[pairs]).all() else "a forbidden entry is used"
