"""64-bit integers, solved exactly: float64 proposes, integers prove, and what is not proved is solved again.

float64 holds integers up to 2^53, and sums of them less far. So an assignment and duals that float64 found may miss the
optimum. Round the column duals to integers v_j, and let u_i be the least c_ij - v_j of a row, in integers. An assignment's
total exceeds the bound of the duals by the sum of its reduced costs c_ij - v_j - u_i >= 0. If that sum is 0, it is optimal.
If it is g, no optimal assignment has a reduced cost above g. So larger ones may be cut to g + 1, and the assignment problem of
what is left is one of small integers, which float64 solves exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmatch.assignment.reading import as_array
from fastmatch.assignment.solution import Assignment

__all__ = ["WideIntegers", "as_minimisation", "integer_gap", "is_wide", "solve_integers", "wide_integers"]

NARROW = 1 << 32
"""Size up to which float64 certifies integers: sums of tens of thousands of them are certain to less than 1."""

BATCH_ENTRIES = 1 << 20
"""Entries that are looked at at once."""

ROUNDS = 8
"""Problems that are solved before giving up; two are enough if float64's sums are as exact as they should be."""

CUT = 1 << 62
"""Differences beyond it are cut: they are known from float64, not from 64-bit arithmetic."""


class WideIntegers(NamedTuple):
    """The minimisation of ``distance``: cost is ``offset + sign * distance``."""

    distance: np.ndarray
    """(n, m) uint64, n <= m: from the least entry, or for a maximisation from the largest."""
    offset: int
    sign: int
    transposed: bool


class _Duals(NamedTuple):
    """Integer column duals: modulo 2^64, and as float64 says."""

    exact: np.ndarray
    rounded: np.ndarray


def is_wide(entries: np.ndarray) -> bool:
    """Return whether these are integers for which float64 is not enough."""
    if entries.dtype.kind in "iu" and entries.dtype.itemsize == 8:
        return entries.size > 0 and max(int(entries.max()), -int(entries.min())) > NARROW
    return entries.dtype.kind == "O" and entries.size > 0 and all(type(x) is int for x in entries.flat)


def wide_integers(cost: Any, maximize: bool) -> WideIntegers | None:
    """Return a matrix of integers for which float64 is not enough, or None if ``cost`` is something else.

    Raises:
        ValueError: the integers are spread over 2^64 or more.
    """
    if isinstance(cost, torch.Tensor):
        if cost.dtype not in (torch.int64, torch.uint64):
            return None
        cost = as_array(cost)
    if not isinstance(cost, np.ndarray) or cost.ndim != 2 or not is_wide(cost):
        return None
    cost = as_array(cost)
    low, high = int(cost.min()), int(cost.max())
    if high - low >= 1 << 64:
        raise ValueError(f"cost: integers must be spread over less than 2^64, got {low} to {high}")
    if cost.dtype.kind == "O":
        distance = (high - cost if maximize else cost - low).astype(np.uint64)
    else:
        bits = cost.astype(np.uint64)  # modulo 2^64, as are the differences
        distance = np.uint64(high % (1 << 64)) - bits if maximize else bits - np.uint64(low % (1 << 64))
    transposed = cost.shape[0] > cost.shape[1]
    return WideIntegers(
        np.ascontiguousarray(distance.T if transposed else distance),
        high if maximize else low,
        -1 if maximize else 1,
        transposed,
    )


def solve_integers(
    given: WideIntegers, warm_start: Assignment | None, solve: Callable[..., Assignment]
) -> Assignment:
    """Return the optimum, proved in integers: gap and bound are 0.

    Args:
        given: the problem.
        warm_start: a solution of a problem of the same shape and sense.
        solve: solves a minimisation in float64; takes a matrix and ``warm_start``.

    Raises:
        ArithmeticError: ``solve`` did not solve small integers exactly.
    """
    n, m = given.distance.shape
    start = None if warm_start is None else as_minimisation(warm_start, given)
    first = found = solve(given.distance.astype(np.float64), warm_start=start)
    duals = _Duals(np.zeros(m, np.uint64), np.zeros(m))
    for _ in range(ROUNDS):
        duals = _sum(duals, _integer_duals(found.v))
        gap, least = integer_gap(given.distance, found.col_ind, duals)
        if gap == 0:
            return _finish(given, found.col_ind, duals, least, first.stats)
        spare = np.minimum(duals.rounded.max() - duals.rounded, gap + 1) if n < m else np.zeros(m)
        rest = np.empty((n, m))
        for rows, part in _differences(given.distance, found.col_ind, duals):
            rest[rows] = np.minimum((part - least[rows, None]).astype(np.float64), gap + 1) - spare
        duals = _sum(duals, spare)
        found = solve(rest)
    raise ArithmeticError(f"no proof in integers after {ROUNDS} solves")


def integer_gap(distance: np.ndarray, cols: np.ndarray, duals: _Duals | np.ndarray) -> tuple[int, np.ndarray]:
    """Return the gap of an assignment of all rows, and each row's least ``c - v`` less that of its pair; in integers."""
    n, m = distance.shape
    if isinstance(duals, np.ndarray):
        duals = _sum(_Duals(np.zeros(m, np.uint64), np.zeros(m)), _integer_duals(duals))
    least = np.empty(n, np.int64)
    for rows, part in _differences(distance, cols, duals):
        least[rows] = part.min(axis=1)
    gap = -sum(least.tolist())
    if n < m:
        unmatched = np.ones(m, bool)
        unmatched[cols] = False
        top = int(np.argmax(duals.rounded))
        gap += sum((duals.exact[top] - duals.exact[unmatched]).tolist())
    return gap, least


def _differences(distance: np.ndarray, cols: np.ndarray, duals: _Duals) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield ranges of rows and, as int64, their ``c - v`` less that of each row's pair, cut at 2^62."""
    n, m = distance.shape
    step = max(1, BATCH_ENTRIES // m)
    for lo in range(0, n, step):
        rows = slice(lo, min(lo + step, n))
        block, pair = distance[rows], np.arange(rows.stop - lo)
        at = cols[rows]
        exact = block - duals.exact
        exact -= exact[pair, at][:, None]
        about = block - duals.rounded
        about -= about[pair, at][:, None]
        yield rows, np.where(about > CUT, CUT, exact.view(np.int64))


def _integer_duals(v: np.ndarray) -> np.ndarray:
    """Return integers, as float64, that are optimal duals of an integer problem if ``v`` are.

    Rounding all duals down keeps them optimal, if a fraction that is only rounding error is not taken for one. So the
    fractions are cut where no dual is near.
    """
    whole = np.floor(v)
    fractions = np.sort(v - whole)
    gaps = np.diff(fractions, append=fractions[:1] + 1)
    k = int(np.argmax(gaps))
    # Whole numbers are added: beyond 2^52 float64 holds no sum of a dual and a fraction.
    return whole + (v - whole > fractions[k] + gaps[k] / 2)


def _sum(duals: _Duals, more: np.ndarray) -> _Duals:
    """Return the duals plus integers that float64 holds."""
    size = np.fmod(np.abs(more), 2.0**64).astype(np.uint64)
    zero = np.uint64(0)
    return _Duals(duals.exact + np.where(more < 0, zero - size, size), duals.rounded + more)


def as_minimisation(assignment: Assignment, given: WideIntegers) -> Assignment:
    """Return an assignment of the cost as one of the minimisation, or back: both ways are the same."""
    pairs = assignment.row_ind, assignment.col_ind
    u, v = given.sign * assignment.u, given.sign * assignment.v
    if given.transposed:
        order = np.argsort(pairs[1])
        pairs, u, v = (pairs[1][order], pairs[0][order]), v, u
    numbers = assignment.objective, assignment.gap, assignment.gap_bound
    return Assignment(*pairs, u, v, *numbers, assignment.stats)


def _finish(
    given: WideIntegers, cols: np.ndarray, duals: _Duals, least: np.ndarray, stats: dict[str, Any]
) -> Assignment:
    n, m = given.distance.shape
    rows = np.arange(n)
    matched = given.distance[rows, cols]
    v = duals.rounded
    u = matched - v[cols] + least
    if n < m:
        top = v.max()
        u, v = u + top, v - top
    objective = n * given.offset + given.sign * sum(matched.tolist())
    u = u + given.sign * float(given.offset)
    return as_minimisation(Assignment(rows, cols, u, v, float(objective), 0.0, 0.0, stats), given)
