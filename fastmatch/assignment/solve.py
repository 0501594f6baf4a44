"""The entry points: a solve that carries its proof, and scipy's contract."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch

from fastmatch._internal.checks import check_type
from fastmatch.assignment.bounded_gain import BoundedGain, solve_bounded
from fastmatch.assignment.candidate_lists import CandidateLists
from fastmatch.assignment.cost import Cost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.dense_shortlists import DenseShortlists
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost
from fastmatch.assignment.gap import duality_gap, settled
from fastmatch.assignment.integers import is_wide, solve_integers, wide_integers
from fastmatch.assignment.problem import LapProblem, LapSolution, Solver, TooLarge
from fastmatch.assignment.reading import EXACT, MANY, as_array, as_real
from fastmatch.assignment.small_dense import SmallDense, solve_small
from fastmatch.assignment.solution import Assignment
from fastmatch_kernels.lap.state import DOUBTFUL, HUGE, LONG, SOLVED, VECTOR, Costs

__all__ = ["linear_sum_assignment", "select_solver", "solve"]

SMALL = 1 << 23
"""Entries up to which a matrix is tried over whole rows first. Most are solved so; lists take over where that takes long."""

SAMPLED = 4096
"""Entries by which the size of the costs is judged."""

LARGE_DUALS = 64.0
"""Largest dual of a warm start, in largest sampled costs; otherwise, in small sampled costs."""

ROUNDED = 1e-12
"""Bound on the rounding, in sums of the matched costs' absolute values, above which duals may be too large."""

SCALE = 128
"""Power of two by which a matrix is divided if its sums leave float64."""

READ_AS = {np.dtype(kind): np.dtype(np.float32) for kind in ("f4", "f2", "i1", "u1", "i2", "u2", "?")} | {
    np.dtype(kind): np.dtype(np.float64) for kind in ("f8", "i4", "u4", "i8", "u8")
}
"""The type in which entries of a small matrix are read, as :func:`fastmatch.assignment.reading.as_real` does."""

STORED = 1 << 24
"""Entries up to which the matrix of a factor cost is computed, in float64 (128 MB), and up to which a matrix on a GPU
comes to the host."""

SMALL_DENSE, DENSE_SHORTLISTS, CANDIDATE_LISTS = (
    SmallDense(hands_over=True),
    DenseShortlists(),
    CandidateLists(),
)
"""The solvers that are used by default. They are made once, because a small solve takes as long as their checks."""


def select_solver(cost: np.ndarray | torch.Tensor | Cost) -> Solver:
    """Return the solver that :func:`solve` uses for ``cost`` by default.

    ====================================================  ========================
    cost                                                  solver
    ====================================================  ========================
    matrix of up to 2^23 entries                          :class:`SmallDense`, which hands over to :class:`DenseShortlists`
    larger matrix                                         :class:`DenseShortlists`
    floating-point tensor on a GPU beyond 2^24 entries,
    :class:`DeviceCost` of that size                      :class:`CandidateLists`
    gain with bounds                                      that of its matrix of bounds
    :class:`FactorCost` of up to 2^24 entries             that of its matrix
    larger :class:`FactorCost`                            :class:`CandidateLists`
    other costs                                           :class:`CandidateLists`
    ====================================================  ========================

    Example:
        >>> type(fm.assignment.select_solver(np.zeros((4000, 4000)))).__name__
        'DenseShortlists'
    """
    integers = wide_integers(cost, False)
    if integers is not None:  # float64 proposes what integers prove
        cost = integers.distance.astype(np.float64)
    cost = _as_cost(cost.bound if isinstance(cost, BoundedGain) else cost, None)
    entries = math.prod(cost.shape)
    if isinstance(cost, (DenseCost, DeviceCost, FactorCost)) and entries <= SMALL:
        return SMALL_DENSE
    if isinstance(cost, DenseCost) or (isinstance(cost, (DeviceCost, FactorCost)) and entries <= STORED):
        return DENSE_SHORTLISTS
    return CANDIDATE_LISTS


def solve(
    cost: np.ndarray | torch.Tensor | Cost,
    *,
    maximize: bool = False,
    warm_start: Assignment | None = None,
    solver: Solver | None = None,
) -> Assignment:
    """Assign rows to columns so that the total cost is least (or largest), with duals and a certificate.

    It minimises ``sum_i c[i, p(i)]`` over the assignments p of the shorter side.

    Example:
        >>> gain = np.random.rand(200, 200)
        >>> found = fm.solve(gain, maximize=True)
        >>> bool(np.isclose(found.objective, gain[found.row_ind, found.col_ind].sum()))
        True
        >>> found.is_certified
        True

    Args:
        cost: (n, m), numpy, torch or a :class:`fastmatch.assignment.Cost`. float32 and float64 are solved as stored (duals are
            float64), half precision as float32, integers of up to 64 bits exactly (beyond 2^32 by a proof in integers: gap and
            bound are 0). +inf forbids an entry (-inf under ``maximize``).
        maximize: look for the largest total.
        warm_start: a solution of a problem of the same shape and sense. Its duals are kept; rows are matched anew.
        solver: a solver object; None for the choice of :func:`fastmatch.assignment.select_solver`.

    Returns:
        An :class:`Assignment`. It is optimal for exactly the entries as stored; ``gap`` and ``gap_bound`` prove it.

    Raises:
        ValueError: NaN, an infinity of the wrong sign, masked entries, integers spread over 2^64 or more, no feasible
            assignment, or a solver that does not take this cost.
        TypeError: entries that are not real numbers, a solver without a method ``solve`` or a class in place of a solver, or
            a ``warm_start`` that is not an :class:`Assignment`.

    Cost: see the solver.
    """
    array = _small_array(cost) if solver is None and warm_start is None else None
    if array is not None:
        found = _solve_small(array, maximize)
        if found is not None:
            return found
    if isinstance(solver, type) and isinstance(solver, Solver):  # a class has the method too
        raise TypeError(f"solver: got the class {solver.__name__}; write {solver.__name__}()")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver: expected a solver object such as DenseShortlists(), got {solver!r}")
    if warm_start is not None:
        check_type("warm_start", warm_start, Assignment)
    if not isinstance(cost, (np.ndarray, torch.Tensor, DenseCost, DeviceCost, FactorCost, BoundedGain, Cost)):
        cost = as_array(cost)
    if isinstance(cost, BoundedGain) and solver is None:
        if not maximize:
            raise ValueError("cost: a BoundedGain has upper bounds only; pass maximize=True")
        return solve_bounded(cost, warm_start, partial(solve, maximize=True))
    integers = wide_integers(cost, maximize)
    if integers is not None:
        return solve_integers(integers, warm_start, partial(solve, solver=solver))
    given = _as_cost(cost, solver)
    if solver is None and warm_start is None and array is None and 0 < math.prod(given.shape) <= SMALL:
        found = None
        if isinstance(given, DenseCost):
            found = _solve_small(given.matrix, maximize)
        elif isinstance(given, FactorCost):
            found = _solve_small_factors(given, maximize)
        if found is not None:
            return found
    chosen = select_solver(given) if solver is None else solver
    if isinstance(given, DeviceCost) and solver is None and not isinstance(chosen, CandidateLists):
        given = DenseCost(given.matrix)
    rows, columns = given.shape
    transposed = rows > columns or (
        rows == columns and isinstance(given, DenseCost) and given.is_column_major
    )
    n, m = (columns, rows) if transposed else (rows, columns)
    if n == 0:
        return _empty(m, transposed)
    sign = -1.0 if maximize else 1.0
    oriented = given.T if transposed else given
    problem = LapProblem(oriented, sign, _first_duals(warm_start, oriented, sign, transposed))
    try:
        solution = chosen.solve(problem)
        if solution is None and isinstance(chosen, SmallDense):
            chosen = DENSE_SHORTLISTS
            if problem.start is not None:  # it did not help
                problem = LapProblem(oriented, sign)
            solution = chosen.solve(problem)
    except TooLarge:
        return _solve_scaled(problem.matrix(chosen), transposed, maximize, chosen)
    if solution is None:
        if isinstance(given, FactorCost) and isinstance(chosen, CandidateLists):
            return solve(given, maximize=maximize, warm_start=warm_start, solver=DENSE_SHORTLISTS)
        if not isinstance(given, (DenseCost, DeviceCost)):
            kind = type(given).__name__
            raise ValueError(
                f"solver: {type(chosen).__name__} does not solve this {kind}; choose another one"
            )
        matrix = DenseCost(given.matrix)
        return solve(matrix, maximize=maximize, warm_start=warm_start, solver=DENSE_SHORTLISTS)
    found = _finish(problem, solution, transposed, type(chosen).__name__)
    doubtful = found.gap > found.gap_bound
    pairs = (found.col_ind, found.row_ind) if transposed else (found.row_ind, found.col_ind)
    if doubtful or found.gap_bound > ROUNDED * np.abs(problem.entries(*pairs)).sum():
        # Duals were so large that their rounding may hide what small costs decide.
        if problem.start is not None:
            return solve(cost, maximize=maximize, solver=solver)
        if isinstance(given, DenseCost):
            kept = _without_large(given.matrix, sign, found)
            if kept is not None:
                return solve(kept, maximize=maximize, solver=solver)
            if doubtful and rows == columns:
                # A row of large entries has a large dual, in whose rounding a gap may hide; as a column it may not.
                turned = LapProblem(oriented.T, sign)
                solution = chosen.solve(turned) or DENSE_SHORTLISTS.solve(turned)
                if solution is not None:
                    other = _finish(turned, solution, not transposed, type(chosen).__name__)
                    return other if other.gap - other.gap_bound < found.gap - found.gap_bound else found
    return found


def _small_array(cost: Any) -> np.ndarray | None:
    """Return ``cost`` as :func:`solve_small` takes it, or None. A small solve has no time for other questions."""
    if type(cost) is not np.ndarray or cost.ndim != 2 or not 0 < cost.size <= SMALL:
        return None
    given = cost.dtype
    dtype = READ_AS.get(given)
    if dtype == given:
        return cost if cost.flags.aligned else None
    if dtype is None or is_wide(cost):
        return None
    return cost.astype(dtype) if cost.size <= MANY else as_real(cost)


def _solve_small(matrix: np.ndarray, maximize: bool) -> Assignment | None:
    """Return the solution by one compiled call; None if there is none, and the slower way says why."""
    state, found = solve_small(matrix, maximize, proof=True, listed=True)
    if state == LONG:
        return solve(matrix, maximize=maximize, solver=DENSE_SHORTLISTS)
    if state not in (SOLVED, DOUBTFUL):
        return None
    (row_ind, col_ind), u, v, numbers = found
    objective, gap, gap_bound, *counts = numbers.tolist()
    stats = _stats("SmallDense", counts)
    solved = Assignment(row_ind, col_ind, u, v, objective, gap, gap_bound, stats)
    if state == DOUBTFUL:
        kept = _without_large(matrix, -1.0 if maximize else 1.0, solved)
        if kept is not None:
            return solve(kept, maximize=maximize)
    if solved.is_certified:
        return solved
    # Rounding has hidden what small costs decide; in another order of steps it may not.
    other = solve(matrix, maximize=maximize, solver=DENSE_SHORTLISTS)
    return other if other.gap - other.gap_bound < gap - gap_bound else solved


def _solve_small_factors(cost: FactorCost, maximize: bool) -> Assignment | None:
    """Return the solution of the cost's matrix, by one compiled call; None if there is none.

    The matrix is rounded. Its duals, on the shorter side less the errors of their entries, are duals of the exact one, and the
    matched costs are off by no more.
    """
    tall = cost.shape[0] > cost.shape[1]
    oriented = cost.T if tall else cost
    matrix = oriented.dense()
    found = _solve_small(matrix.T if tall else matrix, maximize)
    if found is None:
        return None
    return replace(found, gap_bound=found.gap_bound + 3 * float(oriented.entry_error().sum()))


def _without_large(matrix: np.ndarray, sign: float, found: Assignment) -> np.ndarray | None:
    """Return the matrix with entries made smaller that are in no best assignment; None if that leaves large ones.

    An assignment with entry (i, j) costs at least ``c_ij`` and the least entries of the other rows. If that is more than a
    known assignment costs, a smaller entry that is still too much gives the same solutions, and its duals stay feasible.
    """
    rows, cols = found.row_ind, found.col_ind
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        matrix, rows, cols = matrix.T, cols, rows
    # The bound tells of duals that were so large that moving them by a constant left nothing of the others.
    moved = found.gap_bound / (32 * np.finfo(np.float64).eps * len(rows))
    largest, matched = max(np.abs(found.u).max(), np.abs(found.v).max(), moved), matrix[rows, cols]
    # Smaller entries would not make the largest dual smaller than the largest matched cost.
    needed = largest <= np.abs(matched.astype(np.float64)).max()
    if found.is_certified and (needed or not _is_large(largest, matrix, matched, found)):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        costs = sign * matrix.astype(np.float64)
        least = costs.min(axis=1)
        slack = float((costs[rows, cols] - least[rows]).sum())
        margin = 2 * slack + float(np.abs(least).sum()) / LARGE_DUALS  # more than by any rounding
        enough = (least + margin)[:, None]
        large = np.isfinite(costs) & (costs > enough)
    large[rows, cols] = False
    if not 0 < margin < np.inf or not large.any():
        return None
    kept = np.where(large, sign * enough, matrix).astype(matrix.dtype)
    before, after = (np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max() for x in (matrix, kept))
    if after >= before / LARGE_DUALS:
        return None
    return kept.T if tall else kept


def _is_large(largest: float, matrix: np.ndarray, matched: np.ndarray, found: Assignment) -> bool:
    """Whether the largest dual is so large beside the small ones of sampled costs that they may vanish in its rounding."""
    g, (n, m) = np.random.default_rng(0), matrix.shape
    size = np.abs(matrix[g.integers(n, size=SAMPLED), g.integers(m, size=SAMPLED)]).astype(np.float64)
    size = size[np.isfinite(size) & (size > 0)]
    if not len(size) or largest < LARGE_DUALS * np.partition(size, len(size) // 100)[len(size) // 100]:
        return False
    # Sums of three such integers are exact.
    numbers = (size, matched, found.u, found.v)
    return not all((np.rint(x) == x).all() and np.abs(x).max() < EXACT / 4 for x in numbers)


def _solve_scaled(matrix: np.ndarray, transposed: bool, maximize: bool, solver: Solver) -> Assignment:
    """Solve a matrix whose sums leave float64, times 2^-128; what is too large when scaled back becomes infinite.

    Tiny entries vanish then. If the solution shows that no best assignment holds a large entry, these are made smaller
    instead, and the problem is solved as it is.
    """
    given = (matrix.T if transposed else matrix).astype(np.float64, copy=False)
    sign = -1.0 if maximize else 1.0
    with np.errstate(over="ignore"):
        found = solve(given * 2.0**-SCALE, maximize=maximize, solver=solver)
        matched = sign * given[found.row_ind, found.col_ind]
        least = float(-given.max() if maximize else given.min())
        # An assignment with an entry above this costs more than the one found, whatever its other entries are.
        limit = len(matched) * (max(float(matched.max()), 0.0) + max(-least, 0.0)) * 2.0 or 1.0
        above = given < -limit if maximize else given > limit
        if above.any():
            kept = np.where(above & np.isfinite(given), sign * limit, given)
            if np.abs(kept, where=np.isfinite(kept), out=np.zeros_like(kept)).sum() < HUGE:
                return solve(kept, maximize=maximize, solver=solver)
        u, v = np.ldexp(found.u, SCALE), np.ldexp(found.v, SCALE)
        objective, gap, gap_bound = np.ldexp(
            np.array([found.objective, found.gap, found.gap_bound]), SCALE
        ).tolist()
    return Assignment(found.row_ind, found.col_ind, u, v, objective, gap, gap_bound, found.stats)


def _as_cost(cost: Any, solver: Solver | None) -> Cost:
    """Return ``cost`` as a cost object. Tensors stay on a GPU if they are large, or if candidate lists are asked for."""
    if isinstance(cost, (DenseCost, DeviceCost, FactorCost)):
        return cost
    if isinstance(cost, torch.Tensor) and cost.is_floating_point():
        stays = (
            cost.is_cuda and math.prod(cost.shape) > STORED
            if solver is None
            else isinstance(solver, CandidateLists)
        )
        return DeviceCost(cost) if stays else DenseCost(cost)
    if not isinstance(cost, (torch.Tensor, np.ndarray)) and isinstance(cost, Cost):
        return cost
    return DenseCost(cost)


def _empty(m: int, transposed: bool) -> Assignment:
    """Return the solution of a problem whose shorter side is empty."""
    none, sides = np.zeros(0, np.int64), (np.zeros(0), np.zeros(m))
    u, v = reversed(sides) if transposed else sides
    return Assignment(none, none, u, v, 0.0, 0.0, 0.0, {"solver": "none"})


def _first_duals(
    warm_start: Assignment | None, cost: Cost, sign: float, transposed: bool
) -> np.ndarray | None:
    """Return the column duals of an earlier solution, as the minimisation of ``sign * cost`` sees them.

    They count less their median, because a constant changes nothing. If they are then far larger than the costs, these
    would vanish in their rounding, and they are not used.
    """
    if warm_start is None:
        return None
    n, m = cost.shape
    duals = warm_start.u if transposed else warm_start.v
    if duals.shape != (m,):
        raise ValueError(f"warm_start: expected {m} duals of the longer side, got {duals.shape[0]}")
    if not np.isfinite(duals).all():
        return None
    g = np.random.default_rng(0)
    size = np.abs(cost.entries(g.integers(n, size=SAMPLED), g.integers(m, size=SAMPLED)))
    largest = size.max(initial=0.0, where=np.isfinite(size))
    middle = np.partition(duals, m // 2)[m // 2]  # np.median would import masked arrays
    start = sign * (duals - middle)
    return start if np.abs(start).max() / LARGE_DUALS <= largest else None


def _finish(problem: LapProblem, solution: LapSolution, transposed: bool, name: str) -> Assignment:
    """Return the result in the caller's sense and orientation, with its gap."""
    col_of, u, v, counts = solution
    n, m, sign = len(u), len(v), problem.sign
    rounding = 0.0
    if n < m:
        u, v, rounding = settled(u, v, col_of)
    matched = sign * problem.entries(np.arange(n), col_of)
    gap, gap_bound = duality_gap(matched, u, v, col_of)
    if gap > gap_bound and isinstance(problem.cost, DenseCost):
        gap, gap_bound, u, v = _closed(problem.cost.matrix, sign, u, v, col_of)
    gap_bound += rounding
    error = problem.cost.entry_error()
    if error.any():
        # u comes from float64 products summed in some order, as the matched entries do.
        largest = float(np.abs(v).max(initial=0.0))
        gap_bound += 3 * float(error.sum()) + 16 * float(np.finfo(np.float64).eps) * n * largest
    u, v = sign * u, sign * v
    row_ind, col_ind = np.arange(n, dtype=np.int64), col_of.astype(np.int64)
    if transposed:
        order = np.argsort(col_ind)
        row_ind, col_ind, u, v = col_ind[order], row_ind[order], v, u
    return Assignment(
        row_ind, col_ind, u, v, sign * float(matched.sum()), gap, gap_bound, _stats(name, counts)
    )


def _closed(
    matrix: np.ndarray, sign: float, u: np.ndarray, v: np.ndarray, col_of: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Return (gap, gap_bound, u, v) after raising duals of this matching until the gap is within its bound."""
    from fastmatch_kernels.lap.proof import prove

    n, m = matrix.shape
    u, duals = u.copy(), np.zeros(-(-m // VECTOR) * VECTOR)
    duals[:m] = v
    level = np.inf if n == m else 0.0
    flat = np.ascontiguousarray(matrix).reshape(-1)
    _, gap, gap_bound = prove(Costs(flat, 0, n, m, sign), duals, u, col_of, level)
    return gap, gap_bound, u, duals[:m]


COUNTS = ("reads", "bids", "pops", "searches")


def _stats(solver: str, counts: Iterable[float] | None) -> dict[str, int | float | str]:
    """Return an assignment's ``stats``."""
    if counts is None:
        return {"solver": solver}
    return {"solver": solver, **dict(zip(COUNTS, map(int, counts), strict=True))}


@overload
def linear_sum_assignment(
    cost_matrix: torch.Tensor, maximize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_sum_assignment(
    cost_matrix: np.ndarray, maximize: bool = False
) -> tuple[np.ndarray, np.ndarray]: ...
def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve as ``scipy.optimize.linear_sum_assignment`` does, for numpy arrays and torch tensors.

    Example:
        >>> row_ind, col_ind = fm.linear_sum_assignment(np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> col_ind.tolist()
        [1, 0]

    Args:
        cost_matrix: (n, m); see :func:`solve`. The mask of a masked array is ignored, as by scipy, with a warning.
        maximize: look for the largest total.

    Returns:
        (row_ind, col_ind): int64, rows ascending; for a tensor, tensors on its device.

    Raises:
        ValueError: NaN, an infinity of the wrong sign, or no feasible assignment.
    """
    array, solver = _small_array(cost_matrix), None
    if array is not None:
        state, (pairs,) = solve_small(array, maximize, proof=False, listed=True)
        if state == SOLVED:
            return pairs[0], pairs[1]
        if state == LONG:
            cost_matrix, solver = array, DENSE_SHORTLISTS
    if isinstance(cost_matrix, np.ma.MaskedArray):
        if np.ma.is_masked(cost_matrix):
            warnings.warn(
                "cost_matrix: its mask is ignored, as by scipy; fill masked entries with inf to forbid them",
                stacklevel=2,
            )
        cost_matrix = np.asarray(cost_matrix)
    try:
        found = solve(cost_matrix, maximize=maximize, solver=solver)
    except (TypeError, ValueError) as error:  # of solve, whose argument is called cost
        error.args = (re.sub(r"^cost(?=[:\[])", "cost_matrix", str(error)),)
        raise
    if isinstance(cost_matrix, torch.Tensor):
        return (
            torch.from_numpy(found.row_ind).to(cost_matrix.device),
            torch.from_numpy(found.col_ind).to(cost_matrix.device),
        )
    return found.row_ind, found.col_ind
