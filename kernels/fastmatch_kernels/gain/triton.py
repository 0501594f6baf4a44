# pyright: reportArgumentType=false
# Launches pass plain values for tl.constexpr parameters.
"""The dense gain ``G (+)= sum_k A_k B_k^T`` in one launch for several factor pairs, B reordered as it is read.

Operations: ``2 n m sum_k d_k``. Bytes: every tile of G reads its rows of A and B (through L2, tiles are taken in groups
of rows), G is written once, and read once if it is added to. Deterministic. Error of an entry: ``(depth + 2) u |a_i|
|b_j|`` with u as in ``tiles.ROUNDOFF``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.product import factor_arguments, output_tile, plan_product, product_tile
from fastmatch_kernels._triton.tiles import ceil_div
from fastmatch_kernels.gain.reference import GainArguments

__all__ = ["gain"]

PAIRS = 2
"""Pairs of one launch; more are added by further launches, since every pair takes registers."""


@triton.jit
def _gain_kernel(
    factors,
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
    _tile_n, row, column = output_tile(n, m, GROUP, BLOCK_M, BLOCK_N)
    acc = product_tile(factors, b_index_ptr, row, column, n, m, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = (row < n)[:, None] & (column < m)[None, :]
    if ACCUMULATE:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc, mask=mask)


def gain(arguments: GainArguments) -> None:
    """Take float32, bfloat16 or float16 factors and a float32 result.

    Raises:
        TypeError: factors or ``out`` of another dtype.
    """
    a, b, b_index, contraction_index, out, accumulate, precision = arguments
    n, m = out.shape
    plan_product(a, b, m, precision)  # raises for factors that the kernel does not take
    if out.dtype != torch.float32:
        raise TypeError(f"out: expected torch.float32 on the Triton backend, got {out.dtype}")
    if out.numel() == 0:
        return
    if out.stride(1) != 1:
        contiguous = out.contiguous()
        gain(arguments._replace(out=contiguous))
        out.copy_(contiguous)
        return
    for first in range(0, len(a), PAIRS):
        part = slice(first, first + PAIRS)
        tiles, constants = plan_product(a[part], b[part], m, precision)
        _gain_kernel[(ceil_div(n, tiles.rows) * ceil_div(m, tiles.columns),)](
            factor_arguments(a[part], b[part], contraction_index[part]),
            b_index,
            out,
            n,
            m,
            out.stride(0),
            ACCUMULATE=accumulate or first > 0,
            **constants,
        )
