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

from fastmatch_kernels._triton.packing import pack
from fastmatch_kernels._triton.product import (
    check_dtypes,
    factor_arguments,
    output_tile,
    plan_product,
    reduced_cost_tile,
)
from fastmatch_kernels._triton.tiles import ceil_div
from fastmatch_kernels.row_softmin.reference import SoftminArguments, soft_minimum

__all__ = ["row_softmin"]


@triton.jit
def _softmin_kernel(
    factors,
    v_ptr,  # (m,) float32
    part_ptr,  # (n, tiles_n) float32
    temperature,
    n,
    m,
    # These five are written out in every kernel of this kind: Triton takes compile-time constants only as parameters.
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, row, column = output_tile(n, m, GROUP, BLOCK_M, BLOCK_N)
    value = reduced_cost_tile(factors, v_ptr, row, column, n, m, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    least = tl.min(value, 1)
    finite = tl.abs(least) < float("inf")
    shift = tl.where(finite, least, 0.0)
    # At least 1 where the minimum is finite; elsewhere the minimum is the result.
    total = tl.maximum(tl.sum(tl.exp((shift[:, None] - value) / temperature), 1), 1.0)
    at = row.to(tl.int64) * tl.cdiv(m, BLOCK_N) + tile_n
    tl.store(part_ptr + at, tl.where(finite, shift - temperature * tl.log(total), least), mask=row < n)


def row_softmin(arguments: SoftminArguments) -> torch.Tensor:
    """Take float32, bfloat16 or float16 factors."""
    a, b, v, temperature, precision = arguments
    n, m = len(a[0]), len(v)
    check_dtypes(a, b)
    key, tiles, constants = plan_product((n, m), a[0].dtype, precision, v.device, "reduced")
    tiles_n = ceil_div(m, tiles.columns)
    part = torch.empty(n, tiles_n, device=v.device)
    if part.numel():
        _softmin_kernel[(ceil_div(n, tiles.rows) * tiles_n,)](
            factor_arguments(pack(a, key), pack(b, key)),
            v.float().contiguous(),
            part,
            temperature,
            n,
            m,
            **constants,
        )
    return soft_minimum(part, temperature)
