# pyright: reportArgumentType=false
# Launches pass plain values for tl.constexpr parameters.
"""The dense gain ``G (+)= sum_k A_k B_k^T`` in one product of packed factors, B reordered as it is packed.

Operations: ``2 n m sum_k d_k``. Bytes: the factors are read twice and written once where they are packed; every tile of G reads
its rows of A and B (through L2, tiles are taken in groups of rows); G is written once, and read once if it is added to. Deterministic. Error of an
entry: at most :func:`fastmatch_kernels.row_topk.triton.product_error` of its row, without duals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.packing import DEPTH, pack
from fastmatch_kernels._triton.product import (
    check_dtypes,
    factor_arguments,
    output_tile,
    plan_product,
    product_tile,
    scaled,
)
from fastmatch_kernels._triton.tiles import ceil_div
from fastmatch_kernels.gain.reference import GainArguments

__all__ = ["gain"]

PACKED = 1 << 30
"""Bytes of packed factors of one launch; more are added by further launches."""


@triton.jit
def _gain_kernel(
    factors,
    out_ptr,  # (n, m) float32
    n,
    m,
    out_stride,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    _tile_n, row, column = output_tile(n, m, GROUP, BLOCK_M, BLOCK_N)
    acc = product_tile(factors, row, column, n, m, 0, factors[6], PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    acc = scaled(acc, factors, row, column, n, m)
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
    a, b, b_index, order, out, accumulate, precision = arguments
    n, m = out.shape
    check_dtypes(a, b)
    key, tiles, constants = plan_product((n, m), a[0].dtype, precision, out.device)
    if out.dtype != torch.float32:
        raise TypeError(f"out: expected torch.float32 on the Triton backend, got {out.dtype}")
    if out.numel() == 0:
        return
    if out.stride(1) != 1:
        contiguous = out.clone(memory_format=torch.contiguous_format)
        gain(arguments._replace(out=contiguous))
        out.copy_(contiguous)
        return
    for pieces in _pieces(a, b, order, PACKED // (4 * (n + m))):
        lefts, rights, indices = zip(*pieces, strict=True)
        packed = pack(lefts, key), pack(rights, key, b_index, indices)
        _gain_kernel[(ceil_div(n, tiles.rows) * ceil_div(m, tiles.columns),)](
            factor_arguments(*packed), out, n, m, out.stride(0), ACCUMULATE=accumulate, **constants
        )
        accumulate = True


def _pieces(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], order: Sequence[torch.Tensor | None], depth: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]:
    """Yield parts of the pairs, ``depth`` columns together, a multiple of ``DEPTH``: (A's, B's, order of B's columns)."""
    depth = max(depth // DEPTH, 1) * DEPTH
    pieces, held = [], 0
    for left, right, index in zip(a, b, order, strict=True):
        begin = 0
        while begin < left.shape[1]:
            part = slice(begin, min(begin + depth - held, left.shape[1]))
            moved = (right[:, part], None) if index is None else (right, index[part])
            pieces.append((left[:, part], *moved))
            held += part.stop - begin
            begin = part.stop
            if held == depth:
                yield pieces
                pieces, held = [], 0
    if pieces or not any(x.shape[1] for x in a):
        yield pieces or [(a[0], b[0], None)]
