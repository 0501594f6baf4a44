# pyright: reportArgumentType=false
# Launches pass plain values for tl.constexpr parameters.
"""Factors packed as the matrix units read them fastest: all pairs side by side in one matrix, contiguous, aligned, no index left.

A product that reads strided or reordered factors itself is 3 to 20 times slower than one of packed factors (measured on an
H200: docs/design/kernels.md), so they are packed first, which reads and writes each of them once.

A float32 row x becomes half-precision numbers of ``s x``, where s is a power of two that brings the row's largest element to
between 2^12 and 2^13. So nothing overflows, and float16 has the 11 bits of TF32 at twice its speed:

    s x = high + low + r,  |r| <= 2^-22 |s x| + 2^-25;  high alone: |r| <= 2^-11 |s x| + 2^-25

The last terms are below 2^-37 of the largest element. A row that is not finite becomes NaN.

"fp16" multiplies high by high; "fp16x3" adds both products of high and low. Half-precision factors are packed as they are, and
"ieee" packs float32 along the rows, which its multiplications without matrix units read fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Tiles, ceil_div

__all__ = ["DEPTH", "ROWS", "Packed", "largest_of_rows", "pack", "pack_tiles", "part_of", "store_scaled"]

DEPTH = 64
"""Depths are filled up with zeros to a multiple of this, the deepest step of a product, so that it needs no mask."""

ROWS = 16
"""Rows of float32 are filled up to a multiple of this, so that loads along them are aligned."""


class Packed(NamedTuple):
    """One side of a product.

    Attributes:
        high: (rows, depth).
        low: (rows, depth), what float16 left of each element; None if the product is of ``high`` alone.
        scale: (rows,) float32, 2^12 times what the product's row is multiplied by; None if nothing was scaled.
    """

    high: torch.Tensor
    low: torch.Tensor | None
    scale: torch.Tensor | None


@triton.jit
def scaled_rows(x, largest):
    """(s x, scale) of a (rows, columns) tile of float32, with ``scale = 2^-12 / s``, given each row's largest absolute value.

    scale is the power of two at or below ``largest``, so it is normal. s need not be, so x is multiplied in two steps.
    """
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 1), 254)
    first = (139 - exponent) >> 1
    second = 139 - exponent - first
    x *= ((first + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    x *= ((second + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    return x, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """(high, low) in float16 of scaled float32."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def store_scaled(x, largest, row, in_row, at, inside, first, high_ptr, low_ptr, scale_ptr):
    """Write a (rows, columns) tile of float32 as float16, both parts if there is a pointer; the first tile writes the scales."""
    x, scale = scaled_rows(x, largest)
    high, low = split(x)
    tl.store(high_ptr + at, high, mask=inside)
    if low_ptr is not None:
        tl.store(low_ptr + at, low, mask=inside)
    if first:
        tl.store(scale_ptr + row, scale, mask=in_row)


@triton.jit
def _pack_kernel(
    x_ptr,  # (any, any)
    row_ptr,  # (rows,) int64, or None
    column_ptr,  # (columns,) int64, or None
    largest_ptr,  # (any,) float32 by row of x, or None
    high_ptr,  # (rows, ...)
    low_ptr,  # (rows, ...), or None
    scale_ptr,  # (rows,) float32, or None
    rows,
    columns,
    width,  # columns, and zeros behind them
    row_stride,
    column_stride,
    out_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One flat grid: CUDA takes 65535 programs along its second dimension.
    parts = tl.cdiv(width, BLOCK_C)
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = part.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row, in_column = row < rows, column < columns
    source = row if row_ptr is None else tl.load(row_ptr + row, mask=in_row, other=0)
    picked = column if column_ptr is None else tl.load(column_ptr + column, mask=in_column, other=0)
    x = tl.load(
        x_ptr + source[:, None] * row_stride + picked[None, :] * column_stride,
        mask=in_row[:, None] & in_column[None, :],
        other=0.0,
    )
    at = row[:, None] * out_stride + column[None, :]
    mask = in_row[:, None] & (column < width)[None, :]
    if largest_ptr is None:
        tl.store(high_ptr + at, x, mask=mask)
    else:
        largest = tl.load(largest_ptr + source, mask=in_row, other=0.0)
        store_scaled(x, largest, row, in_row, at, mask, part == 0, high_ptr, low_ptr, scale_ptr)


def pack_tiles(column_stride: int, *, interpreted: bool = False) -> Tiles:
    """(rows, columns) of a program: along whichever is contiguous, so that reads and writes are wide."""
    if interpreted:
        return Tiles(64, 64, 1, 4, 1)
    return Tiles(8, 256, 1, 4, 1) if column_stride == 1 else Tiles(32, 32, 1, 4, 1)


def pack(
    factors: Sequence[torch.Tensor],
    precision: str,
    row_index: torch.Tensor | None = None,
    column_index: Sequence[torch.Tensor | None] | None = None,
) -> Packed:
    """Pack (rows, depth) matrices side by side for products in one precision.

    Args:
        factors: all of one dtype and number of rows; any strides.
        precision: "ieee", "fp16" or "fp16x3" for float32, "half" for half precision, which is packed only where it has to be.
        row_index: (rows',) int64, the rows to take, for all factors.
        column_index: for each factor (depth,) int64, the order of its columns, or None.
    """
    order = column_index or [None] * len(factors)
    first = factors[0]
    rows = len(first) if row_index is None else len(row_index)
    depths = [x.shape[1] if index is None else len(index) for x, index in zip(factors, order, strict=True)]
    depth = sum(depths)
    if precision == "ieee":
        return Packed(_along_rows(factors, rows, depth, row_index, order), None, None)
    if (
        precision == "half"
        and row_index is None
        and len(factors) == 1
        and order[0] is None
        and _is_packed(first)
    ):
        return Packed(first, None, None)
    padded = max(ceil_div(depth, DEPTH), 1) * DEPTH
    scaled, device = precision != "half", first.device
    high = torch.empty(rows, padded, dtype=torch.float16 if scaled else first.dtype, device=device)
    low = torch.empty_like(high) if precision == "fp16x3" else None
    scale = torch.empty(rows, device=device) if scaled else None
    largest = largest_of_rows(factors) if scaled else None
    begin = 0
    for position, (x, index) in enumerate(zip(factors, order, strict=True)):
        last = position == len(factors) - 1
        width = padded - begin if last else depths[position]
        tiles = pack_tiles(x.stride(1), interpreted=device.type == "cpu")
        programs = ceil_div(rows, tiles.rows) * ceil_div(width, tiles.columns)
        if programs:
            _pack_kernel[(programs,)](
                x,
                row_index,
                index,
                largest,
                high[:, begin:],
                None if low is None else low[:, begin:],
                scale,
                rows,
                depths[position],
                width,
                x.stride(0),
                x.stride(1),
                padded,
                BLOCK_R=tiles.rows,
                BLOCK_C=tiles.columns,
                **tiles.options,
            )
        begin += width
    return Packed(high, low, scale)


def part_of(packed: Packed, rows: slice) -> Packed:
    """Return some rows of one side."""
    return Packed(*(None if x is None else x[rows] for x in packed))


def _is_packed(x: torch.Tensor) -> bool:
    """Whether a product can read a half-precision matrix where it is."""
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.shape[1] % DEPTH == 0 and x.data_ptr() % 16 == 0


def largest_of_rows(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(rows,) float32: the largest absolute value of each row."""
    largest = torch.zeros(len(factors[0]), device=factors[0].device)
    for x in factors:
        if x.shape[1]:
            largest = torch.maximum(largest, torch.linalg.vector_norm(x, torch.inf, dim=1))
    return largest


def _along_rows(
    factors: Sequence[torch.Tensor],
    rows: int,
    depth: int,
    row_index: torch.Tensor | None,
    order: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """(rows, depth) float32, contiguous along the rows."""
    padded = max(ceil_div(depth, DEPTH), 1) * DEPTH
    along = torch.empty(padded, ceil_div(rows, ROWS) * ROWS, device=factors[0].device)
    along[depth:] = 0
    packed = along.T[:rows]
    begin = 0
    for x, index in zip(factors, order, strict=True):
        if row_index is not None:
            x = x.index_select(0, row_index)
        if index is not None:
            x = x.index_select(1, index)
        packed[:, begin : begin + x.shape[1]] = x
        begin += x.shape[1]
    return packed
