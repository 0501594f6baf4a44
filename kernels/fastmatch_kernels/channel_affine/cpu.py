"""Renormalization of a layer's output on CPU: statistics around the first value as shift, then the affine map.

If positions are contiguous, a task takes one channel through both steps while its values are in the caches: memory is
read once and written once. If channels are contiguous, every task has samples of every channel. All statistics then
precede the map, and the data is read twice.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.channel_affine import reference
from fastmatch_kernels.channel_affine.reference import AffineArguments

__all__ = ["channel_affine"]

SEGMENT = 128
"""Samples of one task and of one float32 sum, if channels are contiguous."""

BLOCK_ENTRIES = 1 << 16
"""Entries of a thread's block at least: some 30 us of work."""

_REASSOCIATE = {"reassoc", "contract"}
METHOD = {name: i for i, name in enumerate(reference.METHODS)}


@njit(inner=True, nogil=True)
def _affine(mean, variance, goal_mean, goal_std, method, eps):
    """Return (centre, scale, goal) of ``z' = (z - centre) scale + goal``: no large numbers cancel at the end."""
    gain = goal_std / math.sqrt(variance + eps)
    if method == 0:
        return mean, gain, goal_mean
    if method == 1:
        return 0.0, gain, 0.0
    return mean, 1.0, goal_mean


@njit(nogil=True, fastmath=_REASSOCIATE)
def _channel_major(x, goal_mean, goal_std, method, eps, out, mean, variance, lo, hi):
    """Map the channels lo to hi of x (B, C, P), positions contiguous."""
    batch, _, positions = x.shape
    count = batch * positions
    for c in range(lo, hi):
        s = x[0, c, 0]
        total = 0.0
        square = 0.0
        for b in range(batch):
            for p0 in range(0, positions, 4096):
                part = np.float32(0)
                part2 = np.float32(0)
                for p in range(p0, min(p0 + 4096, positions)):
                    y = x[b, c, p] - s
                    part += y
                    part2 += y * y
                total += part
                square += part2
        mean[c] = s + total / count
        variance[c] = max(square / count - (total / count) ** 2, 0.0)
        centre, scale, goal = _affine(mean[c], variance[c], goal_mean[c], goal_std[c], method, eps)
        centre32, scale32, goal32 = np.float32(centre), np.float32(scale), np.float32(goal)
        for b in range(batch):
            for p in range(positions):
                out[b, c, p] = (x[b, c, p] - centre32) * scale32 + goal32


@njit(nogil=True, fastmath=_REASSOCIATE)
def _sum_segments(x, sums, lo, hi):
    """Add the sums and squares of segments lo to hi of x (T, C) to ``sums`` (segments, 2, C)."""
    samples, channels = x.shape
    for segment in range(lo, hi):
        total, square = sums[segment, 0], sums[segment, 1]
        for t in range(segment * SEGMENT, min((segment + 1) * SEGMENT, samples)):
            for c in range(channels):
                y = x[t, c] - x[0, c]
                total[c] += y
                square[c] += y * y


@njit(nogil=True)
def _maps(first, sums, samples, goal_mean, goal_std, method, eps, mean, variance, maps):
    """Write each channel's statistics and its centre, scale and goal, ``maps`` (3, C)."""
    for c in range(first.shape[0]):
        total = 0.0
        square = 0.0
        for segment in range(sums.shape[0]):
            total += sums[segment, 0, c]
            square += sums[segment, 1, c]
        mean[c] = first[c] + total / samples
        variance[c] = max(square / samples - (total / samples) ** 2, 0.0)
        centre, scale, goal = _affine(mean[c], variance[c], goal_mean[c], goal_std[c], method, eps)
        maps[0, c], maps[1, c], maps[2, c] = centre, scale, goal


@njit(nogil=True, fastmath=_REASSOCIATE)
def _map_samples(x, maps, out, lo, hi):
    """Map the samples lo to hi of x (T, C), channels contiguous."""
    centre, scale, goal = maps[0], maps[1], maps[2]
    for t in range(lo, hi):
        for c in range(x.shape[1]):
            out[t, c] = (x[t, c] - centre[c]) * scale[c] + goal[c]


def _sample_major(x, goal_mean, goal_std, method, eps, out, mean, variance):
    """Map x (T, C), channels contiguous: two reads."""
    samples, channels = x.shape
    segments = -(-samples // SEGMENT)
    sums = np.zeros((segments, 2, channels), np.float32)
    over_rows(segments, x.size, partial(_sum_segments, x, sums), BLOCK_ENTRIES)
    maps = np.empty((3, channels), np.float32)
    _maps(x[0], sums, samples, goal_mean, goal_std, method, eps, mean, variance, maps)
    over_rows(samples, x.size, partial(_map_samples, x, maps, out), BLOCK_ENTRIES)


def channel_affine(arguments: AffineArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy layouts without a (B, C, P) or (T, C) view; float64 goes through the reference."""
    x, dim, goal_mean, goal_std, method, eps, out = arguments
    if x.dtype == torch.float64:
        return reference.channel_affine(arguments)
    work = x.detach().float()
    view = work.movedim(dim, 1) if work.ndim > 1 else work[None]
    by_sample = view.stride(1) == 1
    if by_sample:
        view = view.movedim(1, -1).reshape(-1, view.shape[1])
    else:
        view = view.reshape(view.shape[0], view.shape[1], -1)
    flat = _same_view(out, dim, by_sample) if out.dtype == torch.float32 else None
    target = torch.empty_like(view) if flat is None else flat
    channels = x.shape[dim]
    mean, variance = (
        torch.empty(channels, dtype=torch.float64, device="cpu"),
        torch.empty(channels, dtype=torch.float64, device="cpu"),
    )
    given = (
        view.numpy(),
        goal_mean.numpy(),
        goal_std.numpy(),
        METHOD[method],
        eps,
        target.numpy(),
        mean.numpy(),
        variance.numpy(),
    )
    if by_sample:
        _sample_major(*given)
    else:
        over_rows(channels, view.numel(), partial(_channel_major, *given), BLOCK_ENTRIES)
    if flat is None:
        moved = out.movedim(dim, -1 if by_sample else 1) if out.ndim > 1 else out
        moved.copy_(target.reshape(moved.shape))
    return mean, variance


def _same_view(out: torch.Tensor, dim: int, by_sample: bool) -> torch.Tensor | None:
    """Return ``out`` in the shape that the kernel writes, or None if that takes a copy."""
    view = out.movedim(dim, 1) if out.ndim > 1 else out[None]
    try:
        if by_sample:
            view = view.movedim(1, -1)
            return view.view(-1, view.shape[-1])
        return view.view(view.shape[0], view.shape[1], -1)
    except RuntimeError:
        return None
