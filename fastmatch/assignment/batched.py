"""Stacks of small problems of one shape: attention heads, experts, blocks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

import numpy as np
import torch

from fastmatch.assignment._compile import prepared
from fastmatch.assignment.solve import prepare_values
from fastmatch_kernels._numba.parallel import threads

__all__ = ["solve_batched"]

PIECE = 1 << 21
"""Entries a worker solves between returns to Python: about 20 ms, so that Ctrl-C is heard."""


@overload
def solve_batched(costs: torch.Tensor, maximize: bool = False) -> torch.Tensor: ...
@overload
def solve_batched(costs: np.ndarray, maximize: bool = False) -> np.ndarray: ...
def solve_batched(costs: Any, maximize: bool = False) -> Any:
    """Solves a stack of assignment problems exactly, in parallel over the cores.

    Example:
        >>> cols = solve_batched(gains, maximize=True)  # gains (heads, n, n)

    Args:
        costs: (batch, n, m), numpy or torch; entries as for :func:`fastmatch.assignment.solve`.
        maximize: look for the largest totals.

    Returns:
        (batch, n) int64: each row's column, -1 for rows left over where n > m. A tensor for a tensor, on its device.

    Raises:
        ValueError: not three-dimensional, or a problem (which is named) that holds NaN, an infinity of the
            wrong sign, or that no assignment solves.
        TypeError: entries that are no real numbers.
    """
    from fastmatch_kernels.lap.stack import solve_stack

    stack = prepare_values(costs)
    if stack.ndim != 3:
        raise ValueError(f"costs: expected (batch, n, m), got {stack.ndim} dimensions")
    batch, rows, columns = stack.shape
    transposed = rows > columns
    given = np.ascontiguousarray(stack.transpose(0, 2, 1)) if transposed else np.ascontiguousarray(stack)
    n, m = given.shape[1:]
    prepared(
        f"the kernels for stacks of {given.dtype}",
        ("stack", given.dtype.char),
        lambda: solve_stack(
            np.zeros((1, 2, 2), given.dtype),
            1.0,
            0,
            1,
            np.zeros((1, 2), np.int64),
            np.zeros(1, np.int8),
            np.zeros((0, 2)),
            np.zeros(4, np.int64),
        ),
    )
    out = np.zeros((batch, n), np.int64)
    bad, no_duals = np.zeros(batch, np.int8), np.zeros((0, m))
    if out.size:
        step = max(1, PIECE // (n * m))
        pieces = [(lo, min(lo + step, batch)) for lo in range(0, batch, step)]
        sign = -1.0 if maximize else 1.0
        pool = ThreadPoolExecutor(min(threads(), len(pieces)))
        try:
            for done in [
                pool.submit(solve_stack, given, sign, lo, hi, out, bad, no_duals, np.zeros(4, np.int64))
                for lo, hi in pieces
            ]:
                done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if bad.any():
        which = int(np.flatnonzero(bad)[0])
        reason = (
            "NaN or an infinity of the wrong sign"
            if bad[which] == 1
            else "no assignment that avoids the forbidden entries"
        )
        raise ValueError(f"costs: problem {which} has {reason}")
    if transposed:
        found = np.full((batch, rows), -1, np.int64)
        np.put_along_axis(found, out, np.broadcast_to(np.arange(n), out.shape), axis=1)
        out = found
    return torch.from_numpy(out).to(costs.device) if isinstance(costs, torch.Tensor) else out
