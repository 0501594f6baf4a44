# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""Soft minima of rows, ``-t log sum_j exp((v_j - c_ij) / t)`` with ``c = -(sum_k A_k B_k^T)``: a half step of Sinkhorn.

The cost matrix is never stored. Each tile of it is formed in registers and hands out one number per row, its own
soft minimum; a soft minimum of these is the row's, since logarithms of sums nest.

Operations: ``2 n m d`` for the products and about 8 n m for the exponentials. Bytes: the factors as in a GEMM, and 4
bytes per row and tile of columns. Deterministic. Error: a soft minimum moves no further than its entries
(:func:`fastmatch_kernels.row_topk.triton.product_error`), and its own rounding is below ``2^-18 t (1 + log m)``.
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
from fastmatch_kernels.gain.triton import check_dtypes, grouped_tile
from fastmatch_kernels.row_softmin.reference import soft_minimum
from fastmatch_kernels.row_topk.triton import GROUP

__all__ = ["row_softmin"]


@triton.jit
def _softmin_kernel(
    a_ptrs,  # K x (n, d)
    b_ptrs,  # K x (m, d)
    depths,
    a_strides,
    b_strides,
    contraction_ptrs,  # K x None
    v_ptr,  # (m,) float32
    part_ptr,  # (n, tiles_n) float32
    temperature,
    n,
    m,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(n, BLOCK_M), tiles_n, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    gain = product_tile(
        a_ptrs,
        b_ptrs,
        depths,
        a_strides,
        b_strides,
        contraction_ptrs,
        row,
        row < n,
        column,
        column < m,
        K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    v = tl.load(v_ptr + column, mask=column < m, other=0.0)
    value = -gain - v[None, :]
    value = tl.where((column < m)[None, :] & (value == value), value, float("inf"))
    least = tl.min(value, 1)
    finite = tl.abs(least) < float("inf")
    shift = tl.where(finite, least, 0.0)
    # At least 1 where the minimum is finite; elsewhere the minimum is the result.
    total = tl.maximum(tl.sum(tl.exp((shift[:, None] - value) / temperature), 1), 1.0)
    at = row.to(tl.int64) * tiles_n + tile_n
    tl.store(part_ptr + at, tl.where(finite, shift - temperature * tl.log(total), least), mask=row < n)


def row_softmin(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    temperature: float,
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """Per row the soft minimum of ``c - v`` (n,) float32; arguments as in the reference, no float64."""
    a, b = ([pair[side] for pair in factors] for side in (0, 1))
    check_dtypes(a, b)
    n, m = len(a[0]), len(v)
    target = target_of(v.device)
    key = precision_of(a[0].dtype, precision)
    tiles = matmul_tiles(n, m, key, target, aligned=factors_aligned(*a, *b))
    tiles_n = ceil_div(m, tiles.columns)
    part = torch.empty(n, tiles_n, device=v.device)
    if part.numel():
        _softmin_kernel[(ceil_div(n, tiles.rows) * tiles_n,)](
            tuple(a),
            tuple(b),
            tuple(x.shape[1] for x in a),
            tuple(x.stride() for x in a),
            tuple(x.stride() for x in b),
            (None,) * len(a),
            v.float().contiguous(),
            part,
            temperature,
            n,
            m,
            K=len(a),
            PRECISION=dot_precision(key, target),
            GROUP=GROUP,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            **tiles.options,
        )
    return soft_minimum(part, temperature)
