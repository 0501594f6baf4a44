"""The entry points: a solve that carries its proof, and scipy's contract."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, overload

import numpy as np
import torch

from fastmatch._internal.checks import check_type
from fastmatch.assignment.candidate_lists import CandidateLists
from fastmatch.assignment.cost import Cost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.dense_shortlists import DenseShortlists
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost
from fastmatch.assignment.gap import duality_gap
from fastmatch.assignment.integers import solve_integers, wide_integers
from fastmatch.assignment.problem import LapProblem, LapSolution, Solver
from fastmatch.assignment.reading import as_array
from fastmatch.assignment.small_dense import SmallDense
from fastmatch.assignment.solution import Assignment

__all__ = ["linear_sum_assignment", "select_solver", "solve"]

SMALL = 1 << 20
"""Entries up to which a matrix is solved by whole rows on one core. Beyond that, rows leave its cache, and lists win."""

STORED = 1 << 24
"""Entries up to which the matrix of a factor cost is computed, in float64 (128 MB), and up to which a matrix on a GPU
comes to the host."""

SMALL_DENSE, DENSE_SHORTLISTS, CANDIDATE_LISTS = SmallDense(), DenseShortlists(), CandidateLists()
"""The solvers with their default options. They are made once, because a small solve takes as long as their checks."""


def select_solver(cost: np.ndarray | torch.Tensor | Cost) -> Solver:
    """Return the solver that :func:`solve` uses for ``cost`` by default.

    ====================================================  ========================
    cost                                                  solver
    ====================================================  ========================
    matrix of up to 2^20 entries                          :class:`SmallDense`
    larger matrix                                         :class:`DenseShortlists`
    floating-point tensor on a GPU beyond 2^24 entries,
    :class:`DeviceCost` of that size                      :class:`CandidateLists`
    :class:`FactorCost` of up to 2^24 entries             :class:`DenseShortlists`
    larger :class:`FactorCost`                            :class:`CandidateLists`
    other costs                                           :class:`CandidateLists`
    ====================================================  ========================

    Example:
        >>> type(fm.assignment.select_solver(np.zeros((2000, 2000)))).__name__
        'DenseShortlists'
    """
    cost = _as_cost(cost, None)
    entries = math.prod(cost.shape)
    if isinstance(cost, (DenseCost, DeviceCost)) and entries <= SMALL:
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
    if isinstance(solver, type) and isinstance(solver, Solver):  # a class has the method too
        raise TypeError(f"solver: got the class {solver.__name__}; write {solver.__name__}()")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"solver: expected a solver object such as DenseShortlists(), got {solver!r}")
    if warm_start is not None:
        check_type("warm_start", warm_start, Assignment)
    if not isinstance(cost, (np.ndarray, torch.Tensor, DenseCost, DeviceCost, FactorCost, Cost)):
        cost = as_array(cost)
    integers = wide_integers(cost, maximize)
    if integers is not None:
        return solve_integers(integers, warm_start, partial(solve, solver=solver))
    given = _as_cost(cost, solver)
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
    problem = LapProblem(
        given.T if transposed else given, sign, _first_duals(warm_start, m, sign, transposed)
    )
    solution = chosen.solve(problem)
    if solution is None:
        if not isinstance(given, (DenseCost, DeviceCost)):
            kind = type(given).__name__
            raise ValueError(
                f"solver: {type(chosen).__name__} does not solve this {kind}; choose another one"
            )
        matrix = DenseCost(given.matrix)
        return solve(matrix, maximize=maximize, warm_start=warm_start, solver=DENSE_SHORTLISTS)
    return _finish(problem, solution, transposed, type(chosen).__name__)


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


def _first_duals(warm_start: Assignment | None, m: int, sign: float, transposed: bool) -> np.ndarray | None:
    """Return the column duals of an earlier solution, as the minimisation sees them."""
    if warm_start is None:
        return None
    duals = warm_start.u if transposed else warm_start.v
    if duals.shape != (m,):
        raise ValueError(f"warm_start: expected {m} duals of the longer side, got {duals.shape[0]}")
    return sign * duals


def _finish(problem: LapProblem, solution: LapSolution, transposed: bool, name: str) -> Assignment:
    """Return the result in the caller's sense and orientation, with its gap."""
    col_of, u, v, counts = solution
    n, m, sign = len(u), len(v), problem.sign
    matched = sign * problem.cost.entries(np.arange(n), col_of)
    gap, gap_bound = duality_gap(matched, u, v, col_of)
    error = problem.cost.entry_error()
    if error.any():
        # u comes from float64 products summed in some order, as the matched entries do.
        largest = float(np.abs(v).max(initial=0.0))
        gap_bound += 3 * float(error.sum()) + 16 * float(np.finfo(np.float64).eps) * n * largest
    if n < m:
        shift = float(v.max())  # 0 unless a warm start moved it
        u, v = u + shift, v - shift
    u, v = sign * u, sign * v
    stats: dict[str, int | float | str] = {"solver": name}
    if counts is not None:
        stats |= zip(("reads", "bids", "pops", "searches"), counts.tolist(), strict=True)
    row_ind, col_ind = np.arange(n, dtype=np.int64), col_of.astype(np.int64)
    if transposed:
        order = np.argsort(col_ind)
        row_ind, col_ind, u, v = col_ind[order], row_ind[order], v, u
    return Assignment(row_ind, col_ind, u, v, sign * float(matched.sum()), gap, gap_bound, stats)


@overload
def linear_sum_assignment(
    cost: torch.Tensor, maximize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_sum_assignment(cost: np.ndarray, maximize: bool = False) -> tuple[np.ndarray, np.ndarray]: ...
def linear_sum_assignment(cost: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve as ``scipy.optimize.linear_sum_assignment`` does, for numpy arrays and torch tensors.

    Example:
        >>> row_ind, col_ind = fm.linear_sum_assignment(np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> col_ind.tolist()
        [1, 0]

    Args:
        cost: (n, m); see :func:`solve`. The mask of a masked array is ignored, as by scipy, with a warning.
        maximize: look for the largest total.

    Returns:
        (row_ind, col_ind): int64, rows ascending; for a tensor, tensors on its device.

    Raises:
        ValueError: NaN, an infinity of the wrong sign, or no feasible assignment.
    """
    if isinstance(cost, np.ma.MaskedArray):
        if np.ma.is_masked(cost):
            warnings.warn(
                "cost: its mask is ignored, as by scipy; fill masked entries with inf to forbid them",
                stacklevel=2,
            )
        cost = np.asarray(cost)
    found = solve(cost, maximize=maximize)
    if isinstance(cost, torch.Tensor):
        return (
            torch.from_numpy(found.row_ind).to(cost.device),
            torch.from_numpy(found.col_ind).to(cost.device),
        )
    return found.row_ind, found.col_ind
