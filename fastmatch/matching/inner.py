"""Inner products of A's and the permuted B's parameters, in float64: what a step of the ascent is judged by."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch

from fastmatch.permutations.apply import moved_positions

__all__ = ["change_of_inner", "inner"]

PIECE = 1 << 20
"""Numbers at a time that torch copies to float64: the copies stay near the processor."""

GATHERED = 4
"""Entries read in order in the time of one that is gathered."""

NATIVE = (torch.float32, torch.float64)
"""Types that the kernel reads."""

Indices = Mapping[int, torch.Tensor]
"""Dimension -> the positions to select by; as :func:`fastmatch.permutations.apply.dimension_indices` gives them."""


def inner(a: torch.Tensor, b: torch.Tensor, indices: Indices) -> float:
    """``<a, b selected by indices>`` in float64."""
    if _has_kernel(a, b, indices):
        return _on_cpu(a, b, {}, indices, None)
    for dim, index in indices.items():
        b = b.index_select(dim, index.to(b.device))
    pairs = zip(a.flatten().split(PIECE), b.to(a.device).flatten().split(PIECE), strict=True)
    return sum(float(torch.dot(x.double(), y.double())) for x, y in pairs)


def change_of_inner(a: torch.Tensor, b: torch.Tensor, now: Indices, then: Indices) -> float:
    """``inner(a, b, now) - inner(a, b, then)`` to float64's rounding of the difference; reads only what moved."""
    moved = moved_positions(now, then, a.shape)
    if not moved:
        return 0.0
    if len(moved) > 1:  # what moves along two dimensions is not a few rows
        return inner(a, b, now) - inner(a, b, then)
    if _has_kernel(a, b, now.keys() | then.keys()):
        return _on_cpu(a, b, moved, now, then)
    (dim, units), total = next(iter(moved.items())), 0.0
    for part in units.split(max(1, PIECE * a.shape[dim] // max(a.numel(), 1))):
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
    """By the kernel: over the positions ``moved``, all of a dimension that is not named there."""
    from fastmatch_kernels._numba.parallel import over_rows
    from fastmatch_kernels.inner_product.cpu import inner as kernel

    shape, first, second, columns = a.shape, -1, -1, 1  # -1: nothing moves there
    dims = sorted(now.keys() | (then or {}).keys())
    # Seen as (outer, rows, middle, columns, rest): rows and columns are what moves, or else what lies before it.
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
        # Unsigned, so that no negative index has to be looked for.
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
