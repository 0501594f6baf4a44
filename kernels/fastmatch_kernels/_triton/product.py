# pyright: reportGeneralTypeIssues=false
# tl.static_range is only known to the compiler.
"""Tiles of ``sum_k A_k B_k^T``, and their launch, for the kernels that read a product of factors: gain and row reductions.

``factors`` of a kernel is one tuple of six, each with an element per pair: pointers to A (n, d) and to B (m, d), depths d,
strides (row, column) of A and of B, and pointers to the contraction index (d,) int64 or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import (
    FACTOR_DTYPES,
    Tiles,
    dot_precision,
    factors_aligned,
    matmul_tiles,
    precision_of,
    target_of,
)

__all__ = [
    "GROUP",
    "dot",
    "factor_arguments",
    "output_tile",
    "plan_product",
    "product_tile",
    "reduced_cost_tile",
]

GROUP = 8
"""Tile rows that are walked together, so that B's tiles are found in L2."""


def plan_product(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], m: int, precision: str
) -> tuple[Tiles, dict[str, Any]]:
    """Return (tiles, constants and compiler options of a launch) of an (n, m) product.

    Raises:
        TypeError: factors that are not all of one dtype that the kernels multiply.
        ValueError: CPU tensors without Triton's interpreter, or a GPU that no tiles were chosen for.
    """
    for k, pair in enumerate(zip(a, b, strict=True)):
        for x in pair:
            if x.dtype not in FACTOR_DTYPES or x.dtype != a[0].dtype:
                raise TypeError(
                    f"factors[{k}]: expected all of one of {FACTOR_DTYPES} on the Triton backend, got {x.dtype}"
                )
    target = target_of(a[0].device)
    key = precision_of(a[0].dtype, precision)
    tiles = matmul_tiles(len(a[0]), m, key, target, aligned=factors_aligned(*a, *b))
    return tiles, {
        "K": len(a),
        "PRECISION": dot_precision(key, target),
        "GROUP": GROUP,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        **tiles.options,
    }


def factor_arguments(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], contraction_index: Sequence[torch.Tensor | None]
) -> tuple[tuple[Any, ...], ...]:
    """Return ``factors`` as the kernels take them."""
    return (
        tuple(a),
        tuple(b),
        tuple(x.shape[1] for x in a),
        tuple(x.stride() for x in a),
        tuple(x.stride() for x in b),
        tuple(contraction_index),
    )


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. In the interpreter always in float32: it ignores the precision and cannot multiply bfloat16."""
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def output_tile(n, m, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tile column, rows, columns) of a flat program number, column by column within groups of tile rows."""
    tiles_n = tl.cdiv(m, BLOCK_N)
    program = tl.program_id(0)
    per_group = GROUP * tiles_n
    first = program // per_group * GROUP
    height = tl.minimum(tl.cdiv(n, BLOCK_M) - first, GROUP)
    tile_m, tile_n = first + program % per_group % height, program % per_group // height
    return tile_n, tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def product_tile(
    factors,
    b_index_ptr,  # (m,) int64, or None: the rows of B
    row,  # (BLOCK_M,)
    column,  # (BLOCK_N,)
    n,
    m,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32; elements outside the matrices are 0."""
    a_ptrs, b_ptrs, depths, a_strides, b_strides, contraction_ptrs = factors
    in_row, in_column = row < n, column < m
    if b_index_ptr is None:
        b_row_index = column
    else:
        b_row_index = tl.load(b_index_ptr + column, mask=in_column, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(K):
        a_row = a_ptrs[k] + row.to(tl.int64)[:, None] * a_strides[k][0]
        b_row = b_ptrs[k] + b_row_index.to(tl.int64)[None, :] * b_strides[k][0]
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


@triton.jit
def reduced_cost_tile(
    factors,
    b_index_ptr,
    v_ptr,  # (m,) float32
    row,
    column,
    n,
    m,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 of ``c - v`` with c minus the product; +inf for NaN and outside the columns."""
    gain = product_tile(factors, b_index_ptr, row, column, n, m, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    v = tl.load(v_ptr + column, mask=column < m, other=0.0)
    value = -gain - v[None, :]
    return tl.where((column < m)[None, :] & (value == value), value, float("inf"))
