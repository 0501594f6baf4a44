"""Soft minima of rows of costs given by factors, on CPU: BLAS tiles, then one pass of vector exponentials.

A row keeps two numbers between tiles: the least value seen and the sum of ``exp((least - x) / t)``. Loops over ``LANES``
numbers with unsigned indices are the form that LLVM turns into vector instructions.
"""

from __future__ import annotations

import numpy as np
import torch

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.row_softmin import reference
from fastmatch_kernels.row_softmin.reference import SoftminArguments
from fastmatch_kernels.row_topk.cpu import TILE, each_tile, products

__all__ = ["row_softmin"]

LANES = 64
EXP_UNDERFLOW = np.float32(-87.0)
"""exp of it is near float32's smallest normal number; smaller arguments add nothing."""
LOG2E = np.float32(1.4426950408889634)
ROUND = np.float32(1.5 * 2**23)
"""Adding and subtracting it rounds to the nearest integer."""
# Taylor coefficients of 2^f for |f| <= 1/2, (ln 2)^n / n!: the relative error after the fifth is 3e-7.
C1, C2, C3, C4, C5 = (np.float32(np.log(2.0) ** k / np.prod(np.arange(1.0, k + 1))) for k in range(1, 6))
ONE = np.float32(1.0)


@njit(nogil=True, inline="always")
def _exp(x):  # pragma: no cover - compiled
    """float32 exp for x <= 0; 0 below EXP_UNDERFLOW, and of NaN."""
    y = (x if x > EXP_UNDERFLOW else EXP_UNDERFLOW) * LOG2E
    whole = (y + ROUND) - ROUND
    f = y - whole
    power = ONE + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * C5))))
    scale = np.uint32(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return power * scale if x > EXP_UNDERFLOW else np.float32(0.0)


@njit(nogil=True)
def add_tile(tile, v, lo, hi, temperature, least, total):  # pragma: no cover - compiled
    """Adds rows lo..hi of ``tile - v`` to their running least value and sum of exponentials."""
    width, lanes, one = np.uintp(tile.shape[1]), np.uintp(LANES), np.uintp(1)
    whole = width - width % lanes
    low, part = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    rate = np.float32(ONE / np.float32(temperature))
    for i in range(lo, hi):
        x = tile[i]
        low[:] = np.float32(np.inf)
        at = np.uintp(0)
        while at < whole:
            for lane in range(LANES):
                y = x[at + np.uintp(lane)] - v[at + np.uintp(lane)]
                low[lane] = y if y < low[lane] else low[lane]
            at += lanes
        best = least[i]
        for lane in range(LANES):
            best = min(best, np.float64(low[lane]))
        while at < width:
            y = x[at] - v[at]
            if y < best:
                best = np.float64(y)
            at += one
        if np.isinf(best):  # nothing yet, or -inf, which stays
            least[i] = best
            continue
        if np.isfinite(least[i]):
            total[i] *= np.exp((best - least[i]) / temperature)
        least[i] = best
        shift = np.float32(best)
        part[:] = np.float32(0.0)
        at = np.uintp(0)
        while at < whole:
            for lane in range(LANES):
                part[lane] += _exp((shift - (x[at + np.uintp(lane)] - v[at + np.uintp(lane)])) * rate)
            at += lanes
        while at < width:
            part[0] += _exp((shift - (x[at] - v[at])) * rate)
            at += one
        for lane in range(LANES):
            total[i] += np.float64(part[lane])


def row_softmin(arguments: SoftminArguments) -> torch.Tensor:
    """Multiply in float32 a tile at a time, whatever the precision asked for; float64 goes through the reference."""
    a, b, v, temperature, _ = arguments
    if a[0].dtype == torch.float64:
        return reference.row_softmin(arguments)
    n, factors = len(a[0]), list(zip(a, b, strict=True))
    least, total, duals = np.full(n, np.inf), np.zeros(n), v.float().numpy()

    def add(tile: np.ndarray, top: int, first: int, lo: int, hi: int) -> None:
        rows = slice(top, top + len(tile))
        add_tile(tile, duals[first:], lo, hi, temperature, least[rows], total[rows])

    each_tile((n, len(v)), TILE, torch.float32, products(factors), add, 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # rows without a finite minimum
        out = np.where(np.isfinite(least), least - temperature * np.log(total), least)
    return torch.from_numpy(out.astype(np.float32))
