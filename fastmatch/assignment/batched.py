"""Stacks of small problems of one shape, as those of attention heads, experts or blocks."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch

from fastmatch.assignment._compile import prepared
from fastmatch.assignment.integers import is_wide
from fastmatch.assignment.reading import as_array, as_real, for_kernels
from fastmatch.assignment.solve import linear_sum_assignment, solve
from fastmatch_kernels._numba.parallel import over_blocks
from fastmatch_kernels.lap.state import DOUBTFUL, SOLVED, TOO_LARGE, WRONG

__all__ = ["solve_batched"]

CHUNK_ENTRIES = 1 << 21
"""Entries that a worker solves between two returns to Python, where Ctrl-C is heard: about 20 ms."""


@overload
def solve_batched(costs: torch.Tensor, maximize: bool = False) -> torch.Tensor: ...
@overload
def solve_batched(costs: np.ndarray, maximize: bool = False) -> np.ndarray: ...
def solve_batched(costs: Any, maximize: bool = False) -> Any:
    """Solve a stack of assignment problems exactly, in parallel over the cores.

    Example:
        >>> gains = torch.randn(8, 32, 32)  # (heads, n, n)
        >>> fm.assignment.solve_batched(gains, maximize=True).shape
        torch.Size([8, 32])

    Args:
        costs: (batch, n, m), numpy or torch; entries as for :func:`fastmatch.assignment.solve`.
        maximize: look for the largest totals.

    Returns:
        (batch, n) int64: each row's column, -1 for rows without one (if n > m). A tensor for a tensor, on its device.

    Raises:
        ValueError: not three-dimensional, or masked entries; or a problem, which is named, holds NaN, an infinity of the
            wrong sign, or has no feasible assignment.
        TypeError: entries that are not real numbers.
    """
    stack = as_array(costs, "costs")
    if stack.ndim != 3:
        raise ValueError(f"costs: expected (batch, n, m), got {stack.ndim} dimensions")
    out = _one_by_one(stack, maximize) if is_wide(stack) else _together(as_real(stack, "costs"), maximize)
    return torch.from_numpy(out).to(costs.device) if isinstance(costs, torch.Tensor) else out


def _one_by_one(stack: np.ndarray, maximize: bool) -> np.ndarray:
    """Return each row's column, for integers beyond float64's."""
    out = np.full(stack.shape[:2], -1, np.int64)
    for cols, matrix in zip(out, stack, strict=True):
        found = solve(matrix, maximize=maximize)
        cols[found.row_ind] = found.col_ind
    return out


def _together(stack: np.ndarray, maximize: bool) -> np.ndarray:
    """Return each row's column."""
    from fastmatch_kernels.lap.small import solve_stack

    batch, rows, columns = stack.shape
    transposed = rows > columns
    given = for_kernels(np.ascontiguousarray(stack.transpose(0, 2, 1) if transposed else stack))
    n, m = given.shape[1:]
    prepared(
        f"the kernels for stacks of {given.dtype}",
        ("stack", given.dtype.char),
        lambda: solve_stack(
            np.zeros(4, given.dtype),
            2,
            2,
            1.0,
            0,
            1,
            np.zeros((1, 2), np.int64),
            np.zeros(1, np.int8),
        ),
    )
    out = np.zeros((batch, n), np.int64)
    bad, flat = np.zeros(batch, np.int8), given.reshape(-1)
    if out.size:
        step = max(1, CHUNK_ENTRIES // (n * m))
        sign = -1.0 if maximize else 1.0
        over_blocks(
            [*range(0, batch, step), batch],
            lambda lo, hi: solve_stack(flat, n, m, sign, lo, hi, out, bad),
        )
    for k in np.flatnonzero(np.isin(bad, (TOO_LARGE, DOUBTFUL))):
        out[k] = linear_sum_assignment(given[k], maximize)[1]
        bad[k] = SOLVED
    if bad.any():
        which = int(np.flatnonzero(bad)[0])
        reason = (
            "NaN or an infinity of the wrong sign"
            if bad[which] == WRONG
            else "no assignment that avoids the forbidden entries"
        )
        raise ValueError(f"costs: problem {which} has {reason}")
    if transposed:
        found = np.full((batch, rows), -1, np.int64)
        np.put_along_axis(found, out, np.broadcast_to(np.arange(n), out.shape), axis=1)
        out = found
    return out
