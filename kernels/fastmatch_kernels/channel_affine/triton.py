# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""Renormalization of a layer's output on the GPU: statistics and affine map in one launch, one write.

A program owns a block of channels. Where all their samples fit one block (HELD) they are read once, kept in
registers, and the variance is two-pass. Else the program reads its channels twice: a channel's samples do not
fit on chip, and what the programs in flight hold together (bytes in flight, about 4 T channels per program)
is meant to be found in L2 the second time. Statistics of the second kind are summed around the first sample.
Where there are fewer blocks of channels than processors, two launches split the samples too: the statistics by the kernel
of ``moments``, then the map.

Bytes: one read and one write of x from memory, a second read from L2 where not HELD. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Tiles, ceil_div, is_aligned, target_of
from fastmatch_kernels.channel_affine.reference import METHODS, AffineArguments
from fastmatch_kernels.moments.triton import DTYPES, _load, _sample_offset, add_statistics, sample_layout

__all__ = ["HELD", "channel_affine", "channel_tiles"]

HELD = 8192
"""Elements of one block kept in registers: 64 a thread at 4 warps, 16 at 16."""


@triton.jit
def _affine(mean, variance, goal_mean_ptr, goal_std_ptr, channel, mask, eps, METHOD: tl.constexpr):
    """(centre, scale, goal) with ``z' = (z - centre) scale + goal``: nothing large cancels at the end."""
    goal_mean = tl.load(goal_mean_ptr + channel, mask=mask, other=0.0)
    goal_std = tl.load(goal_std_ptr + channel, mask=mask, other=1.0)
    gain = goal_std / tl.sqrt(variance + eps)
    zero = mean * 0.0
    if METHOD == 0:
        return mean, gain, goal_mean
    if METHOD == 1:
        return zero, gain, zero
    return mean, zero + 1.0, goal_mean


@triton.jit
def _channel_affine_kernel(
    x_ptr,  # (B, C, *spatial)
    sizes,
    strides,
    stride_c,
    out_ptr,  # (B, C, *spatial)
    out_sizes,
    out_strides,
    out_stride_c,
    goal_mean_ptr,  # (C,) float32
    goal_std_ptr,  # (C,) float32
    mean_ptr,  # (C,) float64
    variance_ptr,  # (C,) float64
    channels,
    samples,
    eps,
    DIMS: tl.constexpr,
    OUT_DIMS: tl.constexpr,
    METHOD: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channel = channel < channels
    out = out_ptr + channel.to(tl.int64)[:, None] * out_stride_c
    if HELD:
        sample = tl.arange(0, BLOCK_T)
        x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, samples, DIMS)
        mean = tl.sum(x, 1) / samples
        y = tl.where(mask, x - mean[:, None], 0.0)
        # What rounding left of the mean is put right, and taken out of the variance.
        left = tl.sum(y, 1) / samples
        variance = tl.maximum(tl.sum(y * y, 1) / samples - left * left, 0.0)
        mean += left
        centre, scale, goal = _affine(
            mean, variance, goal_mean_ptr, goal_std_ptr, channel, in_channel, eps, METHOD
        )
        value = (x - centre[:, None]) * scale[:, None] + goal[:, None]
        at = _sample_offset(sample, out_sizes, out_strides, OUT_DIMS)
        tl.store(out + at[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + channel, mean.to(tl.float64), mask=in_channel)
        tl.store(variance_ptr + channel, variance.to(tl.float64), mask=in_channel)
    else:
        first = tl.load(x_ptr + channel.to(tl.int64) * stride_c, mask=in_channel, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_C,), tl.float64)
        square = tl.zeros((BLOCK_C,), tl.float64)
        for start in range(0, samples, BLOCK_T):
            sample = start + tl.arange(0, BLOCK_T)
            x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, samples, DIMS)
            y = tl.where(mask, x - first[:, None], 0.0)
            total += tl.sum(y, 1).to(tl.float64)
            square += tl.sum(y * y, 1).to(tl.float64)
        part = total / samples
        mean64 = first.to(tl.float64) + part
        variance64 = tl.maximum(square / samples - part * part, 0.0)
        tl.store(mean_ptr + channel, mean64, mask=in_channel)
        tl.store(variance_ptr + channel, variance64, mask=in_channel)
        centre, scale, goal = _affine(
            mean64.to(tl.float32),
            variance64.to(tl.float32),
            goal_mean_ptr,
            goal_std_ptr,
            channel,
            in_channel,
            eps,
            METHOD,
        )
        for start in range(0, samples, BLOCK_T):
            sample = start + tl.arange(0, BLOCK_T)
            x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, samples, DIMS)
            value = (x - centre[:, None]) * scale[:, None] + goal[:, None]
            at = _sample_offset(sample, out_sizes, out_strides, OUT_DIMS)
            tl.store(out + at[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_map_kernel(
    x_ptr,  # (B, C, *spatial)
    sizes,
    strides,
    stride_c,
    out_ptr,  # (B, C, *spatial)
    out_sizes,
    out_strides,
    out_stride_c,
    goal_mean_ptr,  # (C,) float32
    goal_std_ptr,  # (C,) float32
    shift_ptr,  # (C,) float32
    stats_ptr,  # (3, C) float64, sums around the shift
    mean_ptr,  # (C,) float64
    variance_ptr,  # (C,) float64
    channels,
    samples,
    eps,
    DIMS: tl.constexpr,
    OUT_DIMS: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channel = channel < channels
    part = tl.load(stats_ptr + channel, mask=in_channel, other=0.0) / samples
    square = tl.load(stats_ptr + channels + channel, mask=in_channel, other=0.0) / samples
    mean = tl.load(shift_ptr + channel, mask=in_channel, other=0.0).to(tl.float64) + part
    variance = tl.maximum(square - part * part, 0.0)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + channel, mean, mask=in_channel)
        tl.store(variance_ptr + channel, variance, mask=in_channel)
    centre, scale, goal = _affine(
        mean.to(tl.float32),
        variance.to(tl.float32),
        goal_mean_ptr,
        goal_std_ptr,
        channel,
        in_channel,
        eps,
        METHOD,
    )
    out = out_ptr + channel.to(tl.int64)[:, None] * out_stride_c
    for start in range(tl.program_id(1) * BLOCK_T, samples, tl.num_programs(1) * BLOCK_T):
        sample = start + tl.arange(0, BLOCK_T)
        x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, samples, DIMS)
        value = (x - centre[:, None]) * scale[:, None] + goal[:, None]
        at = _sample_offset(sample, out_sizes, out_strides, OUT_DIMS)
        tl.store(out + at[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


def channel_tiles(samples: int, stride_c: int, *, aligned: bool = True) -> tuple[Tiles, bool]:
    """(tile of channels x samples, whether it holds all samples); along whichever is contiguous."""
    wide = 32 if stride_c == 1 else 1
    whole = triton.next_power_of_2(max(samples, 1))
    if wide * whole <= HELD:
        # Without alignment each element's address is in registers too: 32 a thread would spill.
        warps = 4 if aligned or wide * whole <= HELD // 2 else 16
        return Tiles(wide, 1, whole, warps, 1), True
    return Tiles(wide, 1, 64 if wide > 1 else 4096, 4, 2), False


def channel_affine(arguments: AffineArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute in float32.

    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16.
    """
    x, dim, goal_mean, goal_std, method, eps, out = arguments
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected one of {DTYPES} on the Triton backend, got {x.dtype}")
    target = target_of(x.device)
    channels = x.shape[dim]
    mean = torch.empty(channels, dtype=torch.float64, device=x.device)
    variance = torch.empty_like(mean)
    source, sizes, strides, stride_c, dims = sample_layout(x, dim)
    moved, out_sizes, out_strides, out_stride_c, out_dims = sample_layout(out, dim)
    samples = sizes[0] * sizes[1] * sizes[2]
    if moved is not out:  # more sample dimensions than the kernel follows: nothing a network makes
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        results = channel_affine(arguments._replace(out=whole))
        out.copy_(whole)
        return results
    numbers = (*sizes, *strides, stride_c, *out_sizes, *out_strides, out_stride_c)
    tiles, held = channel_tiles(samples, stride_c, aligned=is_aligned((source, out), numbers))
    blocks = ceil_div(channels, tiles.rows)
    both = (source, sizes, strides, stride_c, out, out_sizes, out_strides, out_stride_c)
    goals = (goal_mean.float(), goal_std.float())
    constants = {
        "DIMS": dims,
        "OUT_DIMS": out_dims,
        "METHOD": METHODS.index(method),
        "BLOCK_C": tiles.rows,
        "BLOCK_T": tiles.depth,
        **tiles.options,
    }
    if held or blocks >= target.processors:
        _channel_affine_kernel[(blocks,)](
            *both, *goals, mean, variance, channels, samples, eps, HELD=held, **constants
        )
        return mean, variance
    shift = x.movedim(dim, -1)[(0,) * (x.ndim - 1)].float().contiguous()
    stats = torch.zeros(3, channels, dtype=torch.float64, device=x.device)
    add_statistics(x, dim, shift, stats, target)
    splits = min(ceil_div(4 * target.processors, blocks), ceil_div(samples, tiles.depth))
    _channel_map_kernel[(blocks, splits)](
        *both, *goals, shift, stats, mean, variance, channels, samples, eps, **constants
    )
    return mean, variance
