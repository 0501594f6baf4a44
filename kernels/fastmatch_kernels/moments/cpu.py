"""Streaming moments on CPU: one read of each activation, float32 products, float64 sums.

A batch is processed in chunks. A numba kernel reads a chunk once, with any strides, adds its sums, squares and
off-counts, and writes the shifted values contiguously for the product. Float32 GEMMs over at most ``ROWS`` samples
each are added to the float64 accumulator. The buffers are kept for the next batch, since fresh pages cost more than
reading: at most three of ``CHUNK_ENTRIES`` entries, 96 MiB, for each thread that calls.
Deterministic: no order of summation depends on threads.

Error, per entry of a cross product: float32 rounding of sums of at most ``ROWS`` products,
``gamma_ROWS * |a - s_a|^T |b - s_b|`` with unit roundoff 2^-24, however many batches are added.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.matrix_product import addmm_nt, goes_to_onednn
from fastmatch_kernels.moments import reference
from fastmatch_kernels.moments.reference import MomentsArguments

__all__ = ["moments_update"]

ROWS = 4096
"""Samples of one float32 product at most."""

CHUNK_ENTRIES = 1 << 23
"""Entries of one model's chunk, and of a product: enough that few passes over a wide accumulator are needed and threads
rarely wait for each other, and few enough that the buffers can be kept."""

MIN_CHUNK_SAMPLES = 1024
"""Samples of a chunk at least, if channels are many: each chunk costs a pass over the float64 accumulator."""

SEGMENT = 128
"""Samples of one task and one float32 sum, where channels lie next to each other."""

BLOCK_ENTRIES = 1 << 16
"""Entries of a thread's block at least: some 30 us of work."""

_REASSOCIATE = {"reassoc", "contract"}  # lets sums use vector lanes; NaN and inf keep their meaning


@njit(nogil=True, fastmath=_REASSOCIATE)
def _read_channel_major(x, shift, stats, out, lo, hi):
    """Channels lo to hi of x (B, C, P) -> out (C, B P) shifted; stats (3, C) added to. Positions are near each other."""
    batch, _, positions = x.shape
    for c in range(lo, hi):
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


@njit(nogil=True, fastmath=_REASSOCIATE)
def _read_sample_major(x, shift, sums, out, lo, hi):
    """Segments lo to hi of x (T, C) -> out (T, C) shifted; sums (segments, 3, C) added to. Channels are near each other.

    Four samples at a time, so that the sums are not read and written for each.
    """
    samples, channels = x.shape
    zero = np.float32(0)
    for segment in range(lo, hi):
        total, square, off = sums[segment, 0], sums[segment, 1], sums[segment, 2]
        first = segment * SEGMENT
        last = min(first + SEGMENT, samples)
        fours = first + (last - first) // 4 * 4
        for t in range(first, fours, 4):
            x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
            out0, out1, out2, out3 = out[t], out[t + 1], out[t + 2], out[t + 3]
            for c in range(channels):
                s = shift[c]
                y0, y1, y2, y3 = x0[c] - s, x1[c] - s, x2[c] - s, x3[c] - s
                out0[c], out1[c], out2[c], out3[c] = y0, y1, y2, y3
                total[c] += (y0 + y1) + (y2 + y3)
                square[c] += (y0 * y0 + y1 * y1) + (y2 * y2 + y3 * y3)
                low = np.float32(x0[c] <= zero) + np.float32(x1[c] <= zero)
                off[c] += low + (np.float32(x2[c] <= zero) + np.float32(x3[c] <= zero))
        for t in range(fours, last):
            x0, out0 = x[t], out[t]
            for c in range(channels):
                y0 = x0[c] - shift[c]
                out0[c] = y0
                total[c] += y0
                square[c] += y0 * y0
                off[c] += np.float32(x0[c] <= zero)


@njit(nogil=True)
def _accumulate(blocks, out, lo, hi):
    """Rows lo to hi of out (C, C') float64 += blocks (K, C, C') float32; torch is several times slower where types differ."""
    for i in range(lo, hi):
        for k in range(blocks.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] += blocks[k, i, j]


def _as_batch_channel_position(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, C, P) without a copy where strides allow it; (1, C, T) never: T is split by batch entries."""
    x = x.movedim(dim, 1) if x.ndim > 1 else x[None]
    return x.reshape(x.shape[0], x.shape[1], -1)


def _chunks(batch: int, positions: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of batch entries and of positions with at most ``rows`` samples each, covering all."""
    entries = max(rows // max(positions, 1), 1)
    for start in range(0, batch, entries):
        for first in range(0, positions, rows):
            yield slice(start, start + entries), slice(first, first + rows)


class _Buffers(threading.local):
    """Flat float32 buffers by name. Those no larger than a chunk are kept for the next batch."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def get(self, name: str, entries: int) -> torch.Tensor:
        """A buffer of ``entries`` numbers, not initialized. The next call with this name returns the same memory."""
        found = self.kept.get(name)
        if found is None or found.numel() < entries:
            with torch.inference_mode(False):  # else no later call outside of it could write here
                found = torch.empty(entries, dtype=torch.float32, device="cpu")
            if entries <= CHUNK_ENTRIES:
                self.kept[name] = found
        return found[:entries]


_buffers = _Buffers()


def _add_product(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """``out += x y^T`` of (C, T) and (C', T): whole blocks of ``ROWS`` samples at once, then what is left.

    As many rows of ``out`` at a time as a buffer has room for.
    """
    whole = x.shape[1] // ROWS * ROWS
    for start, stop, block in ((0, whole, ROWS), (whole, x.shape[1], x.shape[1] - whole)):
        if stop == start:
            continue
        left, right = (z[:, start:stop].unflatten(1, (-1, block)).movedim(1, 0) for z in (x, y))
        at_once = max(CHUNK_ENTRIES // max(len(right) * right.shape[1], 1), 1)
        for part, into in zip(left.split(at_once, dim=1), out.split(at_once), strict=True):
            shape = (len(part), part.shape[1], right.shape[1])
            product = _buffers.get("product", math.prod(shape)).view(shape)
            if goes_to_onednn(product[0], part[0], right[0]):
                for x_block, y_block, into_block in zip(part, right, product, strict=True):
                    addmm_nt(into_block, x_block, y_block, beta=0)
            else:
                torch.bmm(part, right.mT, out=product)
            over_rows(
                len(into), product.numel(), partial(_accumulate, product.numpy(), into.numpy()), BLOCK_ENTRIES
            )


def _read_samples(x: np.ndarray, shift: np.ndarray, stats: np.ndarray, out: np.ndarray) -> None:
    """x (T, C) -> out (T, C) shifted; stats (3, C) added to."""
    segments = -(-len(x) // SEGMENT)
    sums = np.zeros((segments, 3, x.shape[1]), np.float32)
    over_rows(segments, x.size, partial(_read_sample_major, x, shift, sums, out), BLOCK_ENTRIES)
    stats += sums.sum(axis=0, dtype=np.float64)


def moments_update(arguments: MomentsArguments) -> None:
    """Add a batch chunk by chunk; float64 goes through the reference."""
    models, dim = arguments.models, arguments.dim
    if any(x.dtype == torch.float64 for x, _, _ in models):
        reference.moments_update(arguments)
        return
    views = [_as_batch_channel_position(x.detach(), dim) for x, _, _ in models]
    # Channel-last data (also every linear layer's) is read along channels, other data along positions.
    by_sample = all(v.stride(1) == 1 or v.shape[2] == 1 for v in views)
    if by_sample:
        views = [v.movedim(1, 2).reshape(1, -1, v.shape[1]).movedim(2, 1) for v in views]
    batch, _, positions = views[0].shape
    channels = [v.shape[1] for v in views]
    rows = max(CHUNK_ENTRIES // max(channels), MIN_CHUNK_SAMPLES)
    buffers = [
        _buffers.get(name, min(rows, batch * positions) * n)
        for name, n in zip(("a", "b"), channels, strict=False)
    ]
    for entries, part in _chunks(batch, positions, rows):
        shifted = []
        for view, buffer, (_, shift, stats) in zip(views, buffers, models, strict=True):
            chunk = view[entries, :, part].float()
            samples = chunk.shape[0] * chunk.shape[2]
            filled = buffer[: samples * view.shape[1]]
            if by_sample:
                kept = filled.view(samples, -1)
                _read_samples(chunk[0].T.numpy(), shift.numpy(), stats.numpy(), kept.numpy())
                shifted.append(kept.T)
            else:
                kept = filled.view(-1, samples)
                read = partial(_read_channel_major, chunk.numpy(), shift.numpy(), stats.numpy(), kept.numpy())
                over_rows(chunk.shape[1], chunk.numel(), read, BLOCK_ENTRIES)
                shifted.append(kept)
        for out, i, j in arguments.products:
            _add_product(shifted[i], shifted[j], out)
