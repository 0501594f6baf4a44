"""Tiles of a product ``A B^T`` of packed factors, and their launch, for the kernels that read one: gain and row reductions.

``factors`` of a kernel is one tuple: pointers to A's high and low parts (n, depth), to B's (m, depth), the strides (row, column) of
A and of B, the depth, and pointers to what rows of A and of B are scaled by. Low parts and scales may be None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.packing import Packed
from fastmatch_kernels._triton.tiles import (
    FACTOR_DTYPES,
    Kind,
    Tiles,
    dot_precision,
    matmul_tiles,
    precision_of,
    target_of,
)

__all__ = [
    "GROUP",
    "check_dtypes",
    "dot",
    "factor_arguments",
    "output_tile",
    "plan_product",
    "product_tile",
    "reduced_cost_tile",
    "scaled",
]

GROUP = 8
"""Tile rows that are walked together, so that B's tiles are found in L2."""


def check_dtypes(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    """Raise TypeError for factors that are not all of one dtype that the kernels multiply."""
    for k, pair in enumerate(zip(a, b, strict=True)):
        for x in pair:
            if x.dtype not in FACTOR_DTYPES or x.dtype != a[0].dtype:
                raise TypeError(
                    f"factors[{k}]: expected all of one of {FACTOR_DTYPES} on the Triton backend, got {x.dtype}"
                )


def plan_product(
    shape: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    device: torch.device,
    kind: Kind = "written",
) -> tuple[str, Tiles, dict[str, Any]]:
    """Return (key of the precision, tiles, constants and compiler options of a launch) of a product of this shape.

    Raises:
        ValueError: CPU tensors without Triton's interpreter, or a GPU that no tiles were chosen for.
    """
    target = target_of(device)
    key = precision_of(dtype, precision)
    tiles = matmul_tiles(*shape, key, target, kind)
    return (
        key,
        tiles,
        {
            "PRECISION": dot_precision(key, target),
            "GROUP": GROUP,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.columns,
            "BLOCK_K": tiles.depth,
            **tiles.options,
        },
    )


def factor_arguments(a: Packed, b: Packed) -> tuple[Any, ...]:
    """Return ``factors`` as the kernels take them."""
    return a.high, a.low, b.high, b.low, a.high.stride(), b.high.stride(), a.high.shape[1], a.scale, b.scale


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
    row,  # (BLOCK_M,)
    column,  # (BLOCK_N,)
    n,
    m,
    begin,  # of the depth, a multiple of BLOCK_K
    end,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32, not scaled; elements outside the matrices are 0."""
    a_ptr, a_low_ptr, b_ptr, b_low_ptr, a_strides, b_strides, _depth, _a_scale_ptr, _b_scale_ptr = factors
    in_row, in_column = (row < n)[:, None], (column < m)[None, :]
    a_at = row.to(tl.int64)[:, None] * a_strides[0]
    b_at = column.to(tl.int64)[None, :] * b_strides[0]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        t = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_step, b_step = a_at + t[None, :] * a_strides[1], b_at + t[:, None] * b_strides[1]
        a = tl.load(a_ptr + a_step, mask=in_row, other=0.0)
        b = tl.load(b_ptr + b_step, mask=in_column, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if a_low_ptr is not None:
            b_low = tl.load(b_low_ptr + b_step, mask=in_column, other=0.0)
            acc = dot(a, b_low, acc, PRECISION)
            a_low = tl.load(a_low_ptr + a_step, mask=in_row, other=0.0)
            acc = dot(a_low, b, acc, PRECISION)
    return acc


@triton.jit
def scaled(acc, factors, row, column, n, m):
    """The product that a tile of scaled factors stands for."""
    a_scale_ptr, b_scale_ptr = factors[7], factors[8]
    if a_scale_ptr is not None:
        a = tl.load(a_scale_ptr + row, mask=row < n, other=1.0)[:, None]
        b = tl.load(b_scale_ptr + column, mask=column < m, other=1.0)[None, :]
        # The smaller one first: the other way round a large one could overflow on the way to a result that does not. What
        # becomes subnormal on the way is kept: Triton's products do not flush.
        acc = acc * 2.0**-24 * tl.minimum(a, b) * tl.maximum(a, b)
    return acc


@triton.jit
def reduced_cost_tile(
    factors,
    v_ptr,  # (m,) float32
    row,
    column,
    n,
    m,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 of ``c - v`` with c minus the product; +inf for NaN and outside the columns."""
    acc = product_tile(factors, row, column, n, m, 0, factors[6], PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    v = tl.load(v_ptr + column, mask=column < m, other=0.0)
    value = -scaled(acc, factors, row, column, n, m) - v[None, :]
    return tl.where((column < m)[None, :] & (value == value), value, float("inf"))
