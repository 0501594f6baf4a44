"""Inner products of a tensor with a reordered one, in plain torch: chunks are copied to float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["change_of_inner", "inner", "row_products", "row_squares", "squares_and_inner"]

SHORT = 1 << 14
"""Numbers up to which torch does not divide the work among threads, which would wait for each other."""

CHUNK = 1 << 20
"""Numbers that are copied to float64 at a time: the copies stay in the caches."""


def inner(a: Tensor, b: Tensor, indices: Mapping[int, Tensor]) -> float | Tensor:
    """Reorder all of ``b``; the result is a scalar on a's device if that is no CPU, so that nobody waits for it."""
    for dim, index in indices.items():
        b = b.index_select(dim, index.to(b.device))
    pairs = zip(a.flatten().split(CHUNK), b.to(a.device).flatten().split(CHUNK), strict=True)
    number = float if a.device.type == "cpu" else Tensor.double
    return sum(number(torch.dot(x.double(), y.double())) for x, y in pairs)


def squares_and_inner(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Copy chunks to float64 that are so short that one thread works on them: sums do not depend on threads."""
    totals = [0.0, 0.0, 0.0]
    for x, y in zip(a.flatten().split(SHORT), b.flatten().split(SHORT), strict=True):
        x, y = x.double(), y.double()
        for k, (left, right) in enumerate(((x, x), (y, y), (x, y))):
            totals[k] += float((left * right).sum())  # a dot product may use threads
    return totals[0], totals[1], totals[2]


def row_products(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Copy so many rows or columns to float64 at a time that the copies stay in the caches."""
    total = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    if a.stride(0) == b.stride(0) == 1 and a.shape[1] > 1:  # the rows are columns of what is stored
        step = max(1, SHORT // max(len(rows), 1))
        for x, y in zip(a.T.split(step), b.T.split(step), strict=True):
            total += (x.index_select(1, rows).double() * y.index_select(1, cols).double()).sum(0)
        return total
    step = max(1, SHORT // max(a.shape[1], 1))
    for lo in range(0, len(rows), step):
        part = slice(lo, lo + step)
        x, y = a.index_select(0, rows[part]).double(), b.index_select(0, cols[part]).double()
        total[part] = (x * y).sum(1)
    return total


def row_squares(a: Tensor) -> Tensor:
    """The products of rows with themselves."""
    rows = torch.arange(len(a), device="cpu")
    return row_products(a, a, rows, rows)


def change_of_inner(
    a: Tensor, b: Tensor, moved: Mapping[int, Tensor], now: Mapping[int, Tensor], then: Mapping[int, Tensor]
) -> float | Tensor:
    """Copy the positions that differ, ``moved``, along their one dimension."""
    ((dim, units),) = moved.items()
    number = float if a.device.type == "cpu" else Tensor.double
    total: float | Tensor = 0.0
    for part in units.split(max(1, CHUNK * a.shape[dim] // max(a.numel(), 1))):
        after, before = (order[dim][part] if dim in order else part for order in (now, then))
        step = b.index_select(dim, after.to(b.device)).double()
        step -= b.index_select(dim, before.to(b.device)).double()
        for other, index in now.items():
            if other != dim:
                step = step.index_select(other, index.to(step.device))
        rows = a.index_select(dim, part.to(a.device)).double()
        total = total + number(torch.dot(rows.flatten(), step.to(rows.device).flatten()))
    return total
