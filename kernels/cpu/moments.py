"""Streaming moments on CPU: one read of each activation, float32 products, float64 sums.

A batch is taken in pieces of about 4096 samples. numba reads a piece once from whatever strides it has, adds
its sums, squares and off-counts, and writes the shifted values in the layout that the product likes; the
product is one float32 GEMM per piece, added to the float64 accumulator. Deterministic: no order of
summation depends on threads.

Error, per entry of a cross product: float32 rounding of sums of at most ``ROWS`` products,
``gamma_ROWS * |a - s_a|^T |b - s_b|`` with unit roundoff 2^-24, however many batches are added.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from fastmatch.kernels.reference import moments as reference

__all__ = ["update"]

ROWS = 4096
"""Samples per product."""

SEGMENT = 128
"""Samples of one task and one float32 sum, where channels lie next to each other."""

_REASSOCIATE = {"reassoc", "contract"}  # lets sums use vector lanes; NaN and inf keep their meaning


@numba.njit(parallel=True, cache=True, fastmath=_REASSOCIATE)
def _read_channel_major(x, shift, stats, out):
    """x (B, C, P) -> out (C, B P) shifted; stats (3, C) added to. Positions are near each other."""
    batch, channels, positions = x.shape
    for c in numba.prange(channels):
        s = shift[c]
        total = 0.0
        square = 0.0
        off = 0
        for b in range(batch):
            part = np.float32(0)
            part2 = np.float32(0)
            base = b * positions
            for p in range(positions):
                value = x[b, c, p]
                y = value - s
                out[c, base + p] = y
                part += y
                part2 += y * y
                off += np.int64(value <= 0)
            total += part
            square += part2
        stats[0, c] += total
        stats[1, c] += square
        stats[2, c] += off


@numba.njit(parallel=True, cache=True, fastmath=_REASSOCIATE)
def _read_sample_major(x, shift, stats, out):
    """x (T, C) -> out (T, C) shifted; stats (3, C) added to. Channels are near each other."""
    samples, channels = x.shape
    segments = (samples + SEGMENT - 1) // SEGMENT
    partial = np.zeros((segments, 3, channels), np.float32)
    for segment in numba.prange(segments):
        total, square, off = partial[segment, 0], partial[segment, 1], partial[segment, 2]
        for t in range(segment * SEGMENT, min((segment + 1) * SEGMENT, samples)):
            for c in range(channels):
                value = x[t, c]
                y = value - shift[c]
                out[t, c] = y
                total[c] += y
                square[c] += y * y
                off[c] += np.float32(value <= 0)
    for segment in range(segments):
        for i in range(3):
            for c in range(channels):
                stats[i, c] += partial[segment, i, c]


def _as_batch_channel_position(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, C, P) without a copy where strides allow it; (1, C, T) never: T is split by batch entries."""
    x = x.movedim(dim, 1) if x.ndim > 1 else x[None]
    return x.reshape(x.shape[0], x.shape[1], -1)


def update(
    a: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    shift_a: torch.Tensor,
    shift_b: torch.Tensor | None,
    stats_a: torch.Tensor,
    stats_b: torch.Tensor | None,
    ab: torch.Tensor | None,
    aa: torch.Tensor | None,
    bb: torch.Tensor | None,
    precision: str = "ieee",
) -> None:
    """Adds one batch to the accumulators, in place. Arguments as in the reference; float64 stays float64."""
    if a.dtype == torch.float64 or (b is not None and b.dtype == torch.float64):
        reference.update(a, b, dim, shift_a, shift_b, stats_a, stats_b, ab, aa, bb)
        return
    models = [(a, shift_a, stats_a)]
    if b is not None:
        assert shift_b is not None
        assert stats_b is not None
        models.append((b, shift_b, stats_b))
    views = [_as_batch_channel_position(x.detach(), dim) for x, _, _ in models]
    # Channel-last data (also every linear layer's) is read along channels, other data along positions.
    by_sample = all(v.stride(1) == 1 or v.shape[2] == 1 for v in views)
    if by_sample:
        views = [v.movedim(1, 2).reshape(-1, v.shape[1]) for v in views]
        step = ROWS
    else:
        step = max(ROWS // max(views[0].shape[2], 1), 1)
    read = _read_sample_major if by_sample else _read_channel_major
    for start in range(0, views[0].shape[0], step):
        shifted = []
        for view, (_, shift, stats) in zip(views, models, strict=True):
            piece = view[start : start + step].float()
            if by_sample:
                out = torch.empty(piece.shape)
            else:
                out = torch.empty(piece.shape[1], piece.shape[0] * piece.shape[2])
            read(piece.numpy(), shift.numpy(), stats.numpy(), out.numpy())
            shifted.append(out.T if by_sample else out)
        for out, i, j in ((ab, 0, 1), (aa, 0, 0), (bb, 1, 1)):
            if out is not None:
                out += shifted[i] @ shifted[j].T
