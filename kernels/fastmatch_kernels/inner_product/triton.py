# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# Launches pass plain values for tl.constexpr parameters.
"""Inner products of a tensor with a reordered one on a GPU: read through the indices, summed in float64.

As on CPU a tensor is (outer, rows, middle, columns, rest), and at most two dimensions are reordered. A program sums a
block of runs of ``columns * rest`` elements and writes one number. Nobody waits: the numbers stay on the device.

Bytes: ``a`` once and ``b`` once, or twice for a difference. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Tiles, ceil_div, target_of

__all__ = ["inner", "inner_tiles"]

BLOCK = 1024
"""Elements that a program reads at a time."""

SPLITS = 64
"""Programs at most that share one run."""


@triton.jit
def _inner_kernel(
    a_ptr,  # (outer, rows, middle, columns, rest)
    b_ptr,  # (outer, rows, middle, columns, rest)
    row_ptr,  # (picked,) int64, or None: rows of a
    now_row_ptr,  # (picked,) int64, or None: rows of b
    then_row_ptr,  # (picked,) int64, or None
    column_ptr,  # (picked columns,) int64, or None
    now_column_ptr,  # (picked columns,) int64, or None
    then_column_ptr,  # (picked columns,) int64, or None
    out_ptr,  # (programs,) float64
    shape,  # (runs, rows, middle, columns, rest, picked rows, picked columns)
    CHANGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    runs, rows, middle, columns, rest, picked, picked_columns = shape
    run = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_run = run < runs
    m = run % middle
    k = (run // middle) % picked
    outer = run // middle // picked
    row = k if row_ptr is None else tl.load(row_ptr + k, mask=in_run, other=0)
    now = k if now_row_ptr is None else tl.load(now_row_ptr + k, mask=in_run, other=0)
    length = columns * rest
    base_a = ((outer * rows + row) * middle + m) * length
    base_now = ((outer * rows + now) * middle + m) * length
    then = k if then_row_ptr is None else tl.load(then_row_ptr + k, mask=in_run, other=0)
    base_then = ((outer * rows + then) * middle + m) * length
    total = tl.zeros((BLOCK_R,), tl.float64)
    end = picked_columns * rest
    for start in range(tl.program_id(1) * BLOCK_L, end, tl.num_programs(1) * BLOCK_L):
        j = start + tl.arange(0, BLOCK_L)
        mask = in_run[:, None] & (j < end)[None, :]
        at = j // rest
        r = j % rest
        column = at.to(tl.int64) if column_ptr is None else tl.load(column_ptr + at, mask=j < end, other=0)
        now_column = (
            at.to(tl.int64) if now_column_ptr is None else tl.load(now_column_ptr + at, mask=j < end, other=0)
        )
        a = tl.load(a_ptr + base_a[:, None] + (column * rest + r)[None, :], mask=mask, other=0.0)
        step = tl.load(b_ptr + base_now[:, None] + (now_column * rest + r)[None, :], mask=mask, other=0.0)
        step = step.to(tl.float64)
        if CHANGE:
            then_column = (
                at.to(tl.int64)
                if then_column_ptr is None
                else tl.load(then_column_ptr + at, mask=j < end, other=0)
            )
            before = tl.load(
                b_ptr + base_then[:, None] + (then_column * rest + r)[None, :], mask=mask, other=0.0
            )
            step -= before.to(tl.float64)
        total += tl.sum(a.to(tl.float64) * step, 1)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + program, tl.sum(total, 0))


def inner_tiles(length: int) -> Tiles:
    """(runs, elements of a run) of one step of a program."""
    columns = min(triton.next_power_of_2(max(length, 1)), BLOCK)
    return Tiles(max(BLOCK // columns, 1), columns, 1, 4, 1)


def inner(
    a: torch.Tensor,
    b: torch.Tensor,
    moved: Mapping[int, torch.Tensor],
    now: Mapping[int, torch.Tensor],
    then: Mapping[int, torch.Tensor] | None,
) -> torch.Tensor:
    """Return the inner product under ``now``, minus that under ``then`` if given, over the positions ``moved``.

    Arguments are those of the CPU kernel. The result is a float64 scalar on the device of ``a``.
    """
    target = target_of(a.device)
    shape, first, second = a.shape, -1, -1  # -1: no such dimension
    dims = sorted(now.keys() | (then or {}).keys())
    if len(dims) == 2:
        first, second = dims
        outer, rows, middle = math.prod(shape[:first]), shape[first], math.prod(shape[first + 1 : second])
    elif dims and dims[0] > 0:
        outer, rows, middle, second = 1, math.prod(shape[: dims[0]]), 1, dims[0]
    else:
        outer, rows, middle, first = 1, shape[0] if shape else 1, 1, 0
    columns = shape[second] if second > 0 else 1
    rest = math.prod(shape[1 + max(first, second) :])

    def positions(dim: int, order: Mapping[int, torch.Tensor]) -> torch.Tensor | None:
        index, picked = order.get(dim), moved.get(dim)
        if index is None:
            index = picked
        elif picked is not None:
            index = index[picked]
        return None if index is None else index.to(a.device, non_blocking=True)

    at_rows, at_columns = positions(first, {}), positions(second, {})
    picked = rows if at_rows is None else len(at_rows)
    picked_columns = columns if at_columns is None else len(at_columns)
    places = [at_rows, positions(first, now), None, at_columns, positions(second, now), None]
    if then is not None:
        places[2], places[5] = positions(first, then), positions(second, then)
    runs = outer * picked * middle
    if not runs * picked_columns * rest:
        return torch.zeros((), dtype=torch.float64, device=a.device)
    tiles = inner_tiles(picked_columns * rest)
    blocks = ceil_div(runs, tiles.rows)
    splits = min(
        ceil_div(4 * target.processors, blocks), ceil_div(picked_columns * rest, tiles.columns), SPLITS
    )
    parts = torch.empty(blocks * splits, dtype=torch.float64, device=a.device)
    _inner_kernel[(blocks, splits)](
        a.detach().contiguous(),
        b.detach().contiguous(),
        *places,
        parts,
        (runs, rows, middle, columns, rest, picked, picked_columns),
        CHANGE=then is not None,
        BLOCK_R=tiles.rows,
        BLOCK_L=tiles.columns,
        **tiles.options,
    )
    return parts.sum()
