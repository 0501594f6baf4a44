"""The dense gain on CPU: BLAS products, B gathered a tile at a time, so no permuted copy of it is made.

A tile is ``ROWS`` of B's rows: gathered once, multiplied while in cache. Half-precision factors are widened
to float32 tile by tile as well. Float32 products whatever ``precision`` says: no CPU path is less exact.
Three bfloat16 products, on CPUs with matrix units for them, were measured no faster than one float32 product.
"""

from __future__ import annotations

import torch

from fastmatch_kernels.gain.reference import gathered

__all__ = ["gain"]

ROWS = 1024


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

    Error: that of float32 products summed in float32 (float64 where ``out`` is), ``gamma_d |A| |B|^T``.
    """
    if not accumulate:
        out.zero_()
    for first, second, index in zip(a, b, contraction_index, strict=True):
        left = first.to(out.dtype)
        plain = b_index is None and index is None and second.dtype == out.dtype
        step = max(len(out.T), 1) if plain else ROWS
        for start in range(0, out.shape[1], step):
            rows = None if b_index is None else b_index[start : start + step]
            tile = second if rows is not None else second[start : start + step]
            out[:, start : start + step].addmm_(left, gathered(tile, rows, index).to(out.dtype).T)
