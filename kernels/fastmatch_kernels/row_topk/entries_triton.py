# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters.
"""Entries of a factor cost in float64 on a GPU: each row of A against the rows of B that its list names.

A program sums one row's products with a block of its list, over a stretch of the depth at a time. Nothing is gathered
into memory.

Bytes: every named row of B once, mostly from L2. Operations: ``2 d`` in float64 per entry. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Tiles, ceil_div

__all__ = ["METRICS", "entries", "entry_tiles"]

METRICS = ("dot", "l2", "l1")
"""The kernel knows a metric by its position here."""


@triton.jit
def _entries_kernel(
    a_ptr,  # (n, d)
    b_ptr,  # (m, d)
    row_ptr,  # (r,) int64
    item_ptr,  # (r, e) int64; -1 for none
    out_ptr,  # (r, e) float64
    count,
    depth,
    a_stride,
    b_stride,
    METRIC: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    at = line * count + slot
    item = tl.load(item_ptr + at, mask=slot < count, other=-1)
    a_row = a_ptr + tl.load(row_ptr + line) * a_stride
    b_rows = b_ptr + item[:, None] * b_stride
    total = tl.zeros((BLOCK_E,), tl.float64)
    for start in range(0, depth, BLOCK_D):
        t = start + tl.arange(0, BLOCK_D)
        a = tl.load(a_row + t, mask=t < depth, other=0.0).to(tl.float64)[None, :]
        b = tl.load(b_rows + t[None, :], mask=(item >= 0)[:, None] & (t < depth)[None, :], other=0.0)
        b = b.to(tl.float64)
        if METRIC == 0:
            term = a * b
        elif METRIC == 1:
            term = tl.where((item >= 0)[:, None], (a - b) * (a - b), 0.0)
        else:
            term = tl.where((item >= 0)[:, None], tl.abs(a - b), 0.0)
        total += tl.sum(term, 1)
    if ADD:
        total += tl.load(out_ptr + at, mask=slot < count, other=0.0)
    tl.store(out_ptr + at, tl.where(item < 0, float("inf"), total), mask=slot < count)


def entry_tiles(depth: int) -> Tiles:
    """(entries of a list, -, depth) of one step."""
    return Tiles(16, 1, min(max(triton.next_power_of_2(depth), 16), 128), 4, 2)


def entries(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rows: torch.Tensor,
    items: torch.Tensor,
    metric: str,
) -> torch.Tensor:
    """Return what :func:`fastmatch_kernels.row_topk.reference.entries` does, from factors with contiguous rows."""
    out = torch.zeros(items.shape, dtype=torch.float64, device=items.device)
    if not out.numel():
        return out
    items = items.contiguous()
    for position, (a, b) in enumerate(factors):
        tiles = entry_tiles(a.shape[1])
        _entries_kernel[(len(rows), ceil_div(items.shape[1], tiles.rows))](
            a,
            b,
            rows,
            items,
            out,
            items.shape[1],
            a.shape[1],
            a.stride(0),
            b.stride(0),
            METRIC=METRICS.index(metric),
            ADD=position > 0,
            BLOCK_E=tiles.rows,
            BLOCK_D=tiles.depth,
            **tiles.options,
        )
    return out
