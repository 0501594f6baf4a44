"""The entry points: scipy's contract, and the solve that carries its proof."""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch

from fastmatch.assignment.candidate_lists import solve_lists, try_lists
from fastmatch.assignment.dense import Dense, check_entries, compile_kernels, solve_dense
from fastmatch.assignment.device import StoredCost
from fastmatch.assignment.factor import DenseCost, FactorCost
from fastmatch.assignment.small_dense import SMALL, solve_small
from fastmatch.assignment.solution import Assignment

__all__ = ["METHODS", "linear_sum_assignment", "select_method", "solve"]

METHODS = ("auto", "shortlist", "rows", "lists", "lapjv")
"""``"shortlist"`` is for matrices, ``"rows"`` for small ones, ``"lists"`` for factor costs, of which it stores no
matrix, and for large tensors on a GPU, which stay there (where lists do not suit the cost, ``"shortlist"`` takes over);
``"lapjv"`` is the reference (square, finite). ``"auto"`` picks by kind, place and size of the cost."""

STORED = 1 << 24
"""Entries up to which a factor cost is simply computed and stored, in float64: 128 MB; and up to which a matrix on a GPU
comes to the host."""

EXACT = 1 << 53


def select_method(cost: np.ndarray | torch.Tensor | FactorCost | DenseCost) -> str:
    """What ``method="auto"`` will use for ``cost``."""
    if isinstance(cost, FactorCost):
        return "lists" if cost.shape[0] * cost.shape[1] > STORED else "shortlist"
    matrix = cost.matrix if isinstance(cost, DenseCost) else cost
    if _is_on_gpu(matrix) and math.prod(matrix.shape) > STORED:
        return "lists"
    return "rows" if math.prod(matrix.shape) <= SMALL else "shortlist"


def _is_on_gpu(cost: Any) -> bool:
    return isinstance(cost, torch.Tensor) and cost.is_cuda and cost.is_floating_point()


def prepare_values(cost: Any) -> np.ndarray:
    """The entries as a numpy array of float32 or float64, copied only where the dtype demands it."""
    if isinstance(cost, torch.Tensor):
        host = cost.detach()
        if host.dtype in (torch.float16, torch.bfloat16):
            host = host.float()
        matrix = host.cpu().numpy()
    else:
        matrix = np.asarray(cost)
    if not matrix.dtype.isnative:
        matrix = matrix.astype(matrix.dtype.newbyteorder("="))
    if matrix.dtype.kind == "b" or matrix.dtype in (np.int8, np.uint8, np.int16, np.uint16, np.float16):
        matrix = matrix.astype(np.float32)
    elif matrix.dtype.kind in "iu":
        if matrix.size and max(int(matrix.max()), -int(matrix.min())) > EXACT:
            raise ValueError("cost: integers beyond 2^53 are not exact in float64; subtract a constant first")
        matrix = matrix.astype(np.float64)
    elif matrix.dtype not in (np.float32, np.float64):
        raise TypeError(f"cost: expected real numbers up to float64, got {matrix.dtype}")
    return matrix


def prepare(cost: Any) -> tuple[np.ndarray, bool]:
    """(matrix, transposed): float32 or float64 with contiguous rows and no more rows than columns.

    float32 and float64 are not copied unless their strides demand it; integers go to float64 where every
    entry is exact, half precision to float32.

    Raises:
        TypeError: not a real numeric matrix.
        ValueError: not two-dimensional, NaN, an infinity of the wrong sign, or integers beyond 2^53.
    """
    matrix = prepare_values(cost)
    if matrix.ndim != 2:
        raise ValueError(f"cost: expected a matrix, got {matrix.ndim} dimensions")
    transposed = matrix.shape[0] > matrix.shape[1]
    if matrix.shape[0] == matrix.shape[1] and matrix.flags.f_contiguous and not matrix.flags.c_contiguous:
        transposed = True  # columns lie together: solve the transpose, which needs no copy
    if transposed:
        matrix = matrix.T
    return np.ascontiguousarray(matrix), transposed


def solve(
    cost: np.ndarray | torch.Tensor | FactorCost | DenseCost,
    *,
    maximize: bool = False,
    warm_start: Assignment | None = None,
    method: str = "auto",
) -> Assignment:
    """The assignment of rows to columns of least (or largest) total cost, with duals and a certificate.

    Example:
        >>> found = solve(gain, maximize=True)
        >>> found.col_ind, found.objective, found.gap <= found.gap_bound

    Args:
        cost: (n, m), numpy or torch, or a :class:`FactorCost`. float32 and float64 are solved as stored (duals are float64), half
            precision as float32, integers exactly. +inf forbids an entry (-inf under ``maximize``).
        maximize: look for the largest total.
        warm_start: an earlier solution of a problem of the same shape and sense; its duals are kept, what is
            no longer tight is matched anew.
        method: one of :data:`METHODS`.

    Returns:
        An :class:`Assignment`: optimal for exactly the matrix as stored; ``gap`` and ``gap_bound`` prove it.

    Raises:
        ValueError: NaN, an infinity of the wrong sign, no feasible assignment, or a method that is unknown or does not
            take this cost.
        TypeError: entries that are no real numbers.

    Cost: beyond 2^20 entries, one read of the matrix where most rows share a column's minimum, as in siblings; two
    for independent entries; and the rows that paths or the auction read again (``stats["reads"]`` counts rows).
    Memory: 24 (index, cost) pairs a row beside the matrix.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if isinstance(cost, DenseCost):
        cost = cost.matrix
    if isinstance(cost, FactorCost):
        return _solve_factor(cost, maximize, warm_start, method)
    if not isinstance(cost, torch.Tensor):
        cost = np.asarray(cost)
    if method == "auto":
        method = select_method(cost)
    if method == "lists":
        found = _solve_where_it_lies(cost, maximize, warm_start)
        if found is not None:
            return found
        method = "shortlist"
    if method == "lapjv":
        return _solve_lapjv(cost, maximize)
    matrix, transposed = prepare(cost)
    n, m = matrix.shape
    sign = -1.0 if maximize else 1.0
    if n == 0:
        return _empty(m, transposed)
    start = _first_duals(warm_start, m, sign, transposed)
    if method == "rows":
        col_of, u, v, counts = solve_small(matrix, sign, start)
    else:
        compile_kernels(matrix.dtype)
        col_of, u, v, counts = solve_dense(Dense(matrix, sign), start)
    rows = np.arange(n)
    matched = sign * matrix[rows, col_of].astype(np.float64)
    return _finish(matched, col_of, u, v, _gap(matched, u, v, col_of), sign, transposed, method, counts)


def _solve_factor(cost: FactorCost, maximize: bool, warm_start: Assignment | None, method: str) -> Assignment:
    """The list solver; ``gap_bound`` includes the rounding of the entries themselves."""
    if method == "lapjv":
        raise ValueError("cost: method 'lapjv' takes a matrix, not a FactorCost")
    transposed = cost.shape[0] > cost.shape[1]
    given = cost.T if transposed else cost
    n, m = given.shape
    sign = -1.0 if maximize else 1.0
    if n == 0:
        return _empty(m, transposed)
    start = _first_duals(warm_start, m, sign, transposed)
    if method == "rows":
        raise ValueError("cost: method 'rows' takes a matrix, not a FactorCost")
    if method == "auto":
        method = select_method(cost)
    solved = solve_lists(given, sign, start) if method == "lists" else _solve_stored(given, sign, start)
    col_of, u, v, counts = solved
    matched = sign * given.entries(np.arange(n), col_of)
    gap, gap_bound = _gap(matched, u, v, col_of)
    # u comes from float64 products summed in some order, as the matched entries do.
    largest = float(np.abs(v).max(initial=0.0))
    gap_bound += 3 * float(given.entry_error().sum()) + 16 * np.finfo(np.float64).eps * n * largest
    return _finish(matched, col_of, u, v, (gap, gap_bound), sign, transposed, method, counts)


def _solve_where_it_lies(cost: Any, maximize: bool, warm_start: Assignment | None) -> Assignment | None:
    """The list solver on a tensor's rows, read on its device; None where it does not suit the entries."""
    if not isinstance(cost, torch.Tensor) or not cost.is_floating_point():
        raise ValueError(
            "method: 'lists' takes a FactorCost or a floating-point matrix in a torch tensor; "
            "other matrices are solved by 'shortlist', 'rows' or 'lapjv'"
        )
    if cost.ndim != 2 or cost.numel() == 0:
        return None
    transposed = cost.shape[0] > cost.shape[1]
    given = StoredCost(cost.detach().T if transposed else cost.detach())
    n, m = given.shape
    if not given.is_finite():
        return None  # forbidden entries, or an error that is told where all others are
    sign = -1.0 if maximize else 1.0
    solved = try_lists(given, sign, _first_duals(warm_start, m, sign, transposed))
    if solved is None:
        return None
    col_of, u, v, counts = solved
    matched = sign * given.entries(np.arange(n), col_of)
    return _finish(matched, col_of, u, v, _gap(matched, u, v, col_of), sign, transposed, "lists", counts)


def _solve_stored(given: FactorCost, sign: float, start: np.ndarray | None) -> tuple[np.ndarray, ...]:
    matrix = given.dense()
    compile_kernels(matrix.dtype)
    return solve_dense(Dense(matrix, sign), start)


def _empty(m: int, transposed: bool) -> Assignment:
    """The solution of a problem whose smaller side is empty."""
    none, sides = np.zeros(0, np.int64), (np.zeros(0), np.zeros(m))
    u, v = reversed(sides) if transposed else sides
    return Assignment(none, none, u, v, 0.0, 0.0, 0.0, {"method": "none"})


def _first_duals(warm_start: Assignment | None, m: int, sign: float, transposed: bool) -> np.ndarray | None:
    """The column duals of an earlier solution, as the minimisation sees them."""
    if warm_start is None:
        return None
    duals = warm_start.u if transposed else warm_start.v
    if duals.shape != (m,):
        raise ValueError(f"warm_start: expected {m} duals of the longer side, got {duals.shape[0]}")
    return sign * duals


def _finish(
    matched: np.ndarray,
    col_of: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    gaps: tuple[float, float],
    sign: float,
    transposed: bool,
    method: str,
    counts: np.ndarray | None = None,
) -> Assignment:
    """The result in the caller's sense and orientation, from the minimisation that was solved."""
    n, m = len(u), len(v)
    if n < m:
        shift = float(v.max())  # 0 unless a warm start moved it
        u, v = u + shift, v - shift
    objective = sign * float(matched.sum())
    u, v = sign * u, sign * v
    stats: dict[str, int | float | str] = {"method": method}
    if counts is not None:
        stats |= zip(("reads", "bids", "pops", "searches"), (int(c) for c in counts), strict=True)
    row_ind, col_ind = np.arange(n, dtype=np.int64), col_of.astype(np.int64)
    if transposed:
        order = np.argsort(col_ind)
        row_ind, col_ind, u, v = col_ind[order], row_ind[order], v, u
    return Assignment(row_ind, col_ind, u, v, objective, *gaps, stats)


def _gap(matched: np.ndarray, u: np.ndarray, v: np.ndarray, col_of: np.ndarray) -> tuple[float, float]:
    gap = float(((matched - v[col_of]) - u).sum())
    if len(v) > len(u):
        unmatched = np.ones(len(v), bool)
        unmatched[col_of] = False
        gap += float((v.max() - v[unmatched]).sum())
    eps = np.finfo(np.float64).eps
    largest = float(np.abs(v).max(initial=0.0))
    size = float((np.abs(matched) + 2 * np.abs(v[col_of])).sum())
    return gap, 4 * eps * (size + len(u) * largest + 1e-300)


def _solve_lapjv(cost: np.ndarray | torch.Tensor, maximize: bool) -> Assignment:
    """The lapjv package (Jonker-Volgenant), the reference; duals come from its own."""
    import lapjv

    matrix, transposed = prepare(cost)
    n, m = matrix.shape
    if n != m:
        raise ValueError(f"cost: method 'lapjv' takes square matrices, got shape {np.shape(cost)}")
    check_entries(matrix, maximize)
    if not np.isfinite(matrix).all():
        raise ValueError("cost: method 'lapjv' takes no forbidden entries")
    sign = -1.0 if maximize else 1.0
    if n < 2:
        cols, v = np.zeros(n, np.int64), np.zeros(n)
    else:
        given = np.negative(matrix) if maximize else matrix
        reference = getattr(lapjv.lapjv, "__wrapped__", lapjv.lapjv)  # fastmatch.backends may stand before it
        cols, _, (_, _, v) = reference(given, force_doubles=matrix.dtype == np.float64)
        cols, v = cols.astype(np.int64), v.astype(np.float64)
    costs = sign * matrix.astype(np.float64)
    u = (costs - v).min(axis=1) if n else np.zeros(0)
    matched = costs[np.arange(n), cols]
    return _finish(matched, cols, u, v, _gap(matched, u, v, cols), sign, transposed, "lapjv")


@overload
def linear_sum_assignment(
    cost: torch.Tensor, maximize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def linear_sum_assignment(cost: np.ndarray, maximize: bool = False) -> tuple[np.ndarray, np.ndarray]: ...
def linear_sum_assignment(cost: Any, maximize: bool = False) -> tuple[Any, Any]:
    """scipy's ``linear_sum_assignment``, faster, for numpy arrays and torch tensors.

    Args:
        cost: (n, m); see :func:`solve`.
        maximize: look for the largest total.

    Returns:
        (row_ind, col_ind): int64, rows ascending; for a tensor, tensors on its device.

    Raises:
        ValueError: NaN, an infinity of the wrong sign, or no feasible assignment.
    """
    found = solve(cost, maximize=maximize)
    if isinstance(cost, torch.Tensor):
        return (
            torch.from_numpy(found.row_ind).to(cost.device),
            torch.from_numpy(found.col_ind).to(cost.device),
        )
    return found.row_ind, found.col_ind
