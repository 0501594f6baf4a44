# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""The dense gain ``G (+)= sum_k A_k B_k^T`` in one launch for several factor pairs, B reordered as it is read.

Operations: ``2 n m sum_k d_k``. Bytes: every tile of G reads its rows of A and B (through L2, tiles are taken
in groups of rows), G is written once, and read once where it is added to. Deterministic. Error of an entry:
``(depth + 2) u |a_i| |b_j|`` with u as in ``tiles.UNIT``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.product import product_tile
from fastmatch_kernels._triton.tiles import (
    ceil_div,
    dot_precision,
    factors_aligned,
    matmul_tiles,
    precision_of,
    target_of,
)

__all__ = ["DTYPES", "gain"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 8
"""Tile rows that are walked together, so that B's tiles are found in L2."""


@triton.jit
def grouped_tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """(tile row, tile column) of a flat program number, column by column within groups of tile rows."""
    program = tl.program_id(0)
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % per_group % height, program % per_group // height


@triton.jit
def _gain_kernel(
    a_ptrs,  # K x (n, d)
    b_ptrs,  # K x (m, d)
    depths,
    a_strides,
    b_strides,
    contraction_ptrs,  # K x (d,) int64, or None
    b_index_ptr,  # (m,) int64, or None
    out_ptr,  # (n, m) float32
    n,
    m,
    out_stride,
    K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N), GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if b_index_ptr is None:
        b_row = column
    else:
        b_row = tl.load(b_index_ptr + column, mask=column < m, other=0)
    acc = product_tile(
        a_ptrs,
        b_ptrs,
        depths,
        a_strides,
        b_strides,
        contraction_ptrs,
        row,
        row < n,
        b_row,
        column < m,
        K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = (row < n)[:, None] & (column < m)[None, :]
    if ACCUMULATE:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc, mask=mask)


def gain(
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    b_index: torch.Tensor | None,
    contraction_index: list[torch.Tensor | None],
    out: torch.Tensor,
    accumulate: bool,
    precision: str = "ieee",
) -> None:
    """Writes the gain to ``out``, or adds it. Arguments as in the reference.

    Raises:
        TypeError: factors that are not float32, bfloat16 or float16, or an ``out`` that is not float32.
    """
    check_dtypes(a, b)
    if out.dtype != torch.float32:
        raise TypeError(f"out: expected torch.float32 on the Triton backend, got {out.dtype}")
    target = target_of(out.device)
    n, m = out.shape
    if out.numel() == 0:
        return
    if out.stride(1) != 1:
        wide = out.contiguous()
        gain(a, b, b_index, contraction_index, wide, accumulate, precision)
        out.copy_(wide)
        return
    key = precision_of(a[0].dtype, precision)
    tiles = matmul_tiles(n, m, key, target, aligned=factors_aligned(*a, *b))
    _gain_kernel[(ceil_div(n, tiles.rows) * ceil_div(m, tiles.columns),)](
        tuple(a),
        tuple(b),
        tuple(x.shape[1] for x in a),
        tuple(x.stride() for x in a),
        tuple(x.stride() for x in b),
        tuple(contraction_index),
        b_index,
        out,
        n,
        m,
        out.stride(0),
        K=len(a),
        ACCUMULATE=accumulate,
        PRECISION=dot_precision(key, target),
        GROUP=GROUP,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=tiles.depth,
        **tiles.options,
    )


def check_dtypes(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Raises TypeError unless all factors have one dtype that the kernels multiply."""
    for k, pair in enumerate(zip(a, b, strict=True)):
        for x in pair:
            if x.dtype not in DTYPES or x.dtype != a[0].dtype:
                raise TypeError(
                    f"factors[{k}]: expected all of one of {DTYPES} on the Triton backend, got {x.dtype}"
                )
