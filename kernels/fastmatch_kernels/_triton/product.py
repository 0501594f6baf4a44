# pyright: reportGeneralTypeIssues=false
# tl.static_range is only known to the compiler.
"""The tile of ``sum_k A_k B_k^T`` that gain and cost_rows share."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dot", "product_tile"]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. The interpreter multiplies in float32 whatever it is told, and bfloat16 not at all."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_tile(
    a_ptrs,  # K x (n, d)
    b_ptrs,  # K x (m, d)
    depths,
    a_strides,  # K x (rows, contraction)
    b_strides,
    contraction_ptrs,  # K x (d,) int64, or None
    row,  # (BLOCK_M,) rows of A
    in_row,
    column,  # (BLOCK_N,) rows of B, already reordered
    in_column,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32; elements outside the matrices are 0."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(K):
        a_row = a_ptrs[k] + row.to(tl.int64)[:, None] * a_strides[k][0]
        b_row = b_ptrs[k] + column.to(tl.int64)[None, :] * b_strides[k][0]
        for start in range(0, depths[k], BLOCK_K):
            t = start + tl.arange(0, BLOCK_K)
            in_depth = t < depths[k]
            if contraction_ptrs[k] is None:
                u = t.to(tl.int64)
            else:
                u = tl.load(contraction_ptrs[k] + t, mask=in_depth, other=0)
            a = tl.load(
                a_row + t.to(tl.int64)[None, :] * a_strides[k][1],
                mask=in_row[:, None] & in_depth[None, :],
                other=0.0,
            )
            b = tl.load(
                b_row + u[:, None] * b_strides[k][1], mask=in_column[None, :] & in_depth[:, None], other=0.0
            )
            acc = dot(a, b, acc, PRECISION)
    return acc
