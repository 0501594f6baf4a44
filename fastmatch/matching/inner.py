"""Inner products of A's and the permuted B's parameters in float64, by which the ascent accepts a step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch

from fastmatch.permutations.apply import moved_positions

__all__ = ["change_of_inner", "inner"]

CHUNK = 1 << 20
"""Elements that torch copies to float64 at a time, so that the copies stay in cache."""

GATHERED = 4
"""The time to gather one element, in elements that are read in order."""

NATIVE = (torch.float32, torch.float64)
"""Element types that the kernel reads."""

Indices = Mapping[int, torch.Tensor]
"""Dimension -> the positions to select by, from :func:`fastmatch.permutations.apply.dimension_indices`."""


def inner(a: torch.Tensor, b: torch.Tensor, indices: Indices) -> float:
    """Return ``<a, b selected by indices>`` in float64."""
    if _has_kernel(a, b, indices):
        return _on_cpu(a, b, {}, indices, None)
    for dim, index in indices.items():
        b = b.index_select(dim, index.to(b.device))
    pairs = zip(a.flatten().split(CHUNK), b.to(a.device).flatten().split(CHUNK), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def change_of_inner(a: torch.Tensor, b: torch.Tensor, now: Indices, then: Indices) -> float:
    """Return ``inner(a, b, now) - inner(a, b, then)``, exact to float64 rounding; reads only rows that moved."""
    moved = moved_positions(now, then, a.shape)
    if not moved:
        return 0.0
    if len(moved) > 1:  # two dimensions moved, so there is no set of rows that covers the change
        return inner(a, b, now) - inner(a, b, then)
    if _has_kernel(a, b, now.keys() | then.keys()):
        return _on_cpu(a, b, moved, now, then)
    (dim, units), total = next(iter(moved.items())), 0.0
    for part in units.split(max(1, CHUNK * a.shape[dim] // max(a.numel(), 1))):
        after, before = (order[dim][part] if dim in order else part for order in (now, then))
        step = b.index_select(dim, after.to(b.device)).double()
        step -= b.index_select(dim, before.to(b.device)).double()
        for other, index in now.items():
            if other != dim:
                step = step.index_select(other, index.to(step.device))
        rows = a.index_select(dim, part.to(a.device)).double()
        total += float(torch.dot(rows.flatten(), step.to(rows.device).flatten()))
    return total


def _has_kernel(a: torch.Tensor, b: torch.Tensor, dims: Collection[int]) -> bool:
    is_native = a.dtype in NATIVE and b.dtype in NATIVE
    return is_native and a.device.type == b.device.type == "cpu" and len(dims) <= 2


def _on_cpu(a: torch.Tensor, b: torch.Tensor, moved: Indices, now: Indices, then: Indices | None) -> float:
    """Call the kernel over the positions ``moved``; dimensions that are not named there are read whole."""
    from fastmatch_kernels._numba.parallel import over_rows
    from fastmatch_kernels.inner_product.cpu import inner as kernel

    shape, first, second, columns = a.shape, -1, -1, 1  # -1: no such dimension
    dims = sorted(now.keys() | (then or {}).keys())
    # View the tensors as (outer, rows, middle, columns, rest); rows and columns are the dimensions that move. If only
    # one moves, the dimensions before it are the rows.
    if len(dims) == 2:
        first, second = dims
        outer, rows, middle = math.prod(shape[:first]), shape[first], math.prod(shape[first + 1 : second])
    elif dims and dims[0] > 0:
        outer, rows, middle, second = 1, math.prod(shape[: dims[0]]), 1, dims[0]
    else:
        outer, rows, middle, first = 1, shape[0], 1, 0
    if second > 0:
        columns = shape[second]
    view = (outer, rows, middle, columns, math.prod(shape[1 + max(first, second) :]))

    def positions(dim: int, count: int, order: Indices) -> np.ndarray:
        index, picked = order.get(dim), moved.get(dim)
        if index is None:
            index = picked
        elif picked is not None:
            index = index[picked]
        # Unsigned, so that the kernel need not handle negative indices.
        return np.arange(count, dtype=np.uint32) if index is None else index.numpy().astype(np.uint32)

    places = [positions(*dim, order) for order in ({}, now) for dim in ((first, rows), (second, columns))]
    before = (
        (None, None) if then is None else (positions(first, rows, then), positions(second, columns, then))
    )
    views = [t.detach().contiguous().view(view).numpy() for t in (a, b)]
    entries = len(places[0]) * len(places[1]) * outer * middle * view[4] * GATHERED
    arguments = [*views, *places, *before]
    parts: list[float] = []
    over_rows(len(places[0]), entries, lambda lo, hi: parts.append(kernel(lo, hi, *arguments)))
    return math.fsum(parts)
