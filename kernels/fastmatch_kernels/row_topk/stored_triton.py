# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters.
"""Shortlists of the rows of a stored matrix on a GPU: the least ``sign * c_ij - v_j`` in float32, in one read.

Tiles hand out candidates and a cut-off, and a second kernel selects, as in :mod:`fastmatch_kernels.row_topk.triton`.

Bytes: the matrix once, ``8 few + 4`` per row and tile. Operations: about ``4 few`` per entry for the picking. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Tiles, ceil_div
from fastmatch_kernels.row_topk.triton import MAX_CANDIDATES, WORKSPACE, few_of, select, write_least

__all__ = ["DTYPES", "TILES", "holds", "matrix_topk"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernel reads. Their entries are exact in float32."""

TILES = Tiles(4, 1024, 1, 4, 2)
"""(rows, columns) of one program."""


@triton.jit
def _stored_candidates_kernel(
    c_ptr,  # (any rows, m), any strides
    row_ptr,  # (n,) int64: rows of the matrix
    v_ptr,  # (m,) float32
    value_ptr,  # (n, tiles_n, few) float32
    column_ptr,  # (n, tiles_n, few) int32
    cutoff_ptr,  # (n, tiles_n) float32
    n,
    m,
    few,
    row_stride,
    column_stride,
    sign,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_n = tl.program_id(0) % tiles_n
    row = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(row_ptr + row, mask=row < n, other=0)
    at = c_ptr + source[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    c = tl.load(at, mask=(row < n)[:, None] & (column < m)[None, :], other=0.0).to(tl.float32)
    v = tl.load(v_ptr + column, mask=column < m, other=0.0)
    value = sign * c - v[None, :]
    value = tl.where((column < m)[None, :] & (value == value), value, float("inf"))
    at = row.to(tl.int64) * tiles_n + tile_n
    cutoff = write_least(value, few, tile_n * BLOCK_N, at, row < n, value_ptr, column_ptr, BLOCK_N)
    tl.store(cutoff_ptr + at, cutoff, mask=row < n)


def holds(m: int, k: int) -> bool:
    """Whether one selection holds the candidates of m columns."""
    tiles_n = ceil_div(m, TILES.columns)
    return 0 < k <= m and tiles_n * few_of(k, tiles_n) <= MAX_CANDIDATES


def matrix_topk(
    matrix: torch.Tensor, rows: torch.Tensor, v: torch.Tensor, k: int, sign: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (columns (r, k) int64, least computed value outside the list (r,) float32); -1 where there are fewer.

    Computed values differ from the true ones by at most ``2^-23 (|c| + |v|)``, and by nothing if v is zero.

    Args:
        matrix: (any, m) of ``DTYPES``, on a GPU.
        rows: (r,) int64, rows of the matrix.
        v: (m,) float32.
        k: entries per row; ``holds(m, k)``.
        sign: 1 or -1.
    """
    n, m, device = len(rows), len(v), matrix.device
    index = torch.full((n, k), -1, dtype=torch.int64, device=device)
    best, cost = (torch.empty(n, k, device=device) for _ in range(2))
    outside = torch.full((n,), float("inf"), device=device)
    tiles_n = ceil_div(m, TILES.columns)
    few = few_of(k, tiles_n)
    step = max(WORKSPACE // (tiles_n * (8 * few + 4)) // TILES.rows, 1) * TILES.rows
    count = min(step, n)
    value = torch.empty(count, tiles_n, few, device=device)
    column = torch.empty(count, tiles_n, few, dtype=torch.int32, device=device)
    cutoff = torch.empty(count, tiles_n, device=device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        count = part.stop - start
        _stored_candidates_kernel[(ceil_div(count, TILES.rows) * tiles_n,)](
            matrix,
            rows[part],
            v,
            value,
            column,
            cutoff,
            count,
            m,
            few,
            matrix.stride(0),
            matrix.stride(1),
            sign,
            BLOCK_M=TILES.rows,
            BLOCK_N=TILES.columns,
            **TILES.options,
        )
        select((value, column, cutoff), v, (index[part], best[part], cost[part], outside[part]), few)
    return index, outside
