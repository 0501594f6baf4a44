"""The dense gain on CPU: products by BLAS, with B gathered a tile at a time, so that no permuted copy of it is made.

A tile is ``ROWS`` rows of B. It is gathered once and multiplied while it is in the caches. Half-precision factors are
widened to float32 a tile at a time too. Products are in float32 whatever ``precision`` says: no CPU path is less exact.
Three bfloat16 products, on CPUs with matrix units for them, were measured no faster than one float32 product.

Error: that of float32 products summed in float32 (float64 if ``out`` is), ``gamma_d |A| |B|^T``.
"""

from __future__ import annotations

from fastmatch_kernels.gain.reference import GainArguments, gathered
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = ["gain"]

ROWS = 1024
"""Rows of B in a tile."""


def gain(arguments: GainArguments) -> None:
    """Multiply tile by tile into ``out``."""
    a, b, b_index, contraction_index, out, accumulate, _ = arguments
    if not accumulate:
        out.zero_()
    for first, second, index in zip(a, b, contraction_index, strict=True):
        left = first.to(out.dtype)
        needs_copy = b_index is not None or index is not None or second.dtype != out.dtype
        step = ROWS if needs_copy else max(len(out.T), 1)
        for start in range(0, out.shape[1], step):
            rows = None if b_index is None else b_index[start : start + step]
            tile = second if rows is not None else second[start : start + step]
            addmm_nt(out[:, start : start + step], left, gathered(tile, rows, index).to(out.dtype))
