"""Renormalization of a layer's output on CPU: statistics around the first value as shift, then the affine map.

If positions are contiguous, a task takes one channel through both steps while its values are in the caches: memory is
read once and written once. If channels are contiguous, every task has samples of every channel. All statistics then
precede the map, and the data is read twice.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.channel_affine import reference
from fastmatch_kernels.channel_affine.reference import AffineArguments

__all__ = ["channel_affine"]

SEGMENT = 128
"""Samples of one task and of one float32 sum, if channels are contiguous."""

_REASSOCIATE = {"reassoc", "contract"}
METHOD = {name: i for i, name in enumerate(reference.METHODS)}


@njit(nogil=True)
def _affine(mean, variance, goal_mean, goal_std, method, eps):
    """Return (centre, scale, goal) of ``z' = (z - centre) scale + goal``: no large numbers cancel at the end."""
    gain = goal_std / math.sqrt(variance + eps)
    if method == 0:
        return mean, gain, goal_mean
    if method == 1:
        return 0.0, gain, 0.0
    return mean, 1.0, goal_mean


@njit(parallel=True, fastmath=_REASSOCIATE)
def _channel_major(x, goal_mean, goal_std, method, eps, out, mean, variance):
    """Map x (B, C, P), positions contiguous."""
    batch, channels, positions = x.shape
    count = batch * positions
    for c in numba.prange(channels):
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


@njit(parallel=True, fastmath=_REASSOCIATE)
def _sample_major(x, goal_mean, goal_std, method, eps, out, mean, variance):
    """Map x (T, C), channels contiguous: two reads."""
    samples, channels = x.shape
    segments = (samples + SEGMENT - 1) // SEGMENT
    partial = np.zeros((segments, 2, channels), np.float32)
    for segment in numba.prange(segments):
        total, square = partial[segment, 0], partial[segment, 1]
        for t in range(segment * SEGMENT, min((segment + 1) * SEGMENT, samples)):
            for c in range(channels):
                y = x[t, c] - x[0, c]
                total[c] += y
                square[c] += y * y
    centre = np.empty(channels, np.float32)
    scale = np.empty(channels, np.float32)
    goal = np.empty(channels, np.float32)
    for c in range(channels):
        total64 = 0.0
        square64 = 0.0
        for segment in range(segments):
            total64 += partial[segment, 0, c]
            square64 += partial[segment, 1, c]
        mean[c] = x[0, c] + total64 / samples
        variance[c] = max(square64 / samples - (total64 / samples) ** 2, 0.0)
        centre[c], scale[c], goal[c] = _affine(mean[c], variance[c], goal_mean[c], goal_std[c], method, eps)
    for segment in numba.prange(segments):
        for t in range(segment * SEGMENT, min((segment + 1) * SEGMENT, samples)):
            for c in range(channels):
                out[t, c] = (x[t, c] - centre[c]) * scale[c] + goal[c]


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
    run = _sample_major if by_sample else _channel_major
    run(
        view.numpy(),
        goal_mean.numpy(),
        goal_std.numpy(),
        METHOD[method],
        eps,
        target.numpy(),
        mean.numpy(),
        variance.numpy(),
    )
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
