"""Streaming moments of two models' activations, both read from their own strides in one launch.

    stats += (sum_t y, sum_t y^2, #{x <= 0}),  cross += sum_t y_a y_b^T,  with y = x - shift

Products accumulate in float32 over at most CHUNK samples and are then added to float64 accumulators, so the
error does not grow with the data. Activations of shape (B, C, *spatial) are addressed through up to three
sample dimensions; contiguous, channels-last and cropped maps need no copy.

The statistics ride along with the product: the programs of the first column of tiles add up A's, those of
the first row B's, from values they hold anyway. A product inside one model ("aa", "bb") is a launch of its
own and reads its model again.

A program takes one chunk of samples for one tile; chunks in flight together have accumulators of their own,
which are added in order at the end. No atomics: the result is deterministic.

Bytes: as a GEMM, ``T C (tiles_b + tiles_a)`` elements through L2, each activation at least once from memory;
16 bytes of float64 accumulator per element and CHUNK samples. Operations: ``2 T C_a C_b``.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.product import dot
from fastmatch_kernels._triton.tiles import (
    CROSS,
    Target,
    Tiles,
    ceil_div,
    dot_precision,
    is_aligned,
    matmul_tiles,
    target_of,
)
from fastmatch_kernels.moments.reference import MomentsArguments

__all__ = ["CHUNK", "add_statistics", "moments_update", "sample_layout"]

CHUNK = 4096
"""Samples per float32 accumulator."""

Model = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(activations, shift, statistics)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _sample_offset(sample, sizes, strides, DIMS: tl.constexpr):
    """int64 offsets of flat sample numbers in up to three sample dimensions, the innermost last."""
    if DIMS == 1:
        offset = sample.to(tl.int64) * strides[2]
    else:
        outer = sample // sizes[2]
        offset = (sample - outer * sizes[2]).to(tl.int64) * strides[2]
        if DIMS == 2:
            offset += outer.to(tl.int64) * strides[1]
        else:
            outermost = outer // sizes[1]
            offset += (outer - outermost * sizes[1]).to(tl.int64) * strides[1]
            offset += outermost.to(tl.int64) * strides[0]
    return offset


@triton.jit
def _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, end, DIMS: tl.constexpr):
    """(channels, samples) block of float32, and which of it exists."""
    mask = (channel < channels)[:, None] & (sample < end)[None, :]
    offset = channel.to(tl.int64)[:, None] * stride_c + _sample_offset(sample, sizes, strides, DIMS)[None, :]
    return tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit
def _sums(x, y, mask):
    """Sum, sum of squares and number of samples that are not above 0, of every channel of a block."""
    return tl.sum(y, 1), tl.sum(y * y, 1), tl.sum(((x <= 0) & mask).to(tl.float32), 1)


@triton.jit
def _flush(stats_ptr, channel, channels, total, square, off):
    """Adds float32 partial statistics to (3, C) float64."""
    mask = channel < channels
    at = stats_ptr + channel
    tl.store(at, tl.load(at, mask=mask) + total.to(tl.float64), mask=mask)
    at += channels
    tl.store(at, tl.load(at, mask=mask) + square.to(tl.float64), mask=mask)
    at += channels
    tl.store(at, tl.load(at, mask=mask) + off.to(tl.float64), mask=mask)


@triton.jit
def _cross_kernel(
    a_ptr,  # (B, C_a, *spatial)
    b_ptr,  # (B, C_b, *spatial)
    a_sizes,  # sample dimensions, outermost first
    a_strides,
    a_stride_c,
    b_sizes,
    b_strides,
    b_stride_c,
    shift_a_ptr,  # (C_a,) float32
    shift_b_ptr,  # (C_b,) float32
    stats_a_ptr,  # (splits, 3, C_a) float64
    stats_b_ptr,  # (splits, 3, C_b) float64
    cross_ptr,  # (splits, C_a, C_b) float64
    channels_a,
    channels_b,
    samples,
    first,  # sample that this launch starts from
    STATS: tl.constexpr,
    DIMS_A: tl.constexpr,
    DIMS_B: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile_a = tl.program_id(0)
    tile_b = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    channel_a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    channel_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    shift_a = tl.load(shift_a_ptr + channel_a, mask=channel_a < channels_a, other=0.0)
    shift_b = tl.load(shift_b_ptr + channel_b, mask=channel_b < channels_b, other=0.0)
    begin = first + tl.program_id(2) * CHUNK
    end = tl.minimum(begin + CHUNK, samples)
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    # Written out for a, b and in the kernel below: the loop updates each by name, so a helper would save nothing.
    total_a = tl.zeros((BLOCK_A,), tl.float32)
    square_a = tl.zeros((BLOCK_A,), tl.float32)
    off_a = tl.zeros((BLOCK_A,), tl.float32)
    total_b = tl.zeros((BLOCK_B,), tl.float32)
    square_b = tl.zeros((BLOCK_B,), tl.float32)
    off_b = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(begin, end, BLOCK_T):
        sample = start + tl.arange(0, BLOCK_T)
        a, mask_a = _load(a_ptr, a_sizes, a_strides, a_stride_c, channel_a, channels_a, sample, end, DIMS_A)
        b, mask_b = _load(b_ptr, b_sizes, b_strides, b_stride_c, channel_b, channels_b, sample, end, DIMS_B)
        y_a = tl.where(mask_a, a - shift_a[:, None], 0.0)
        y_b = tl.where(mask_b, b - shift_b[:, None], 0.0)
        acc = dot(y_a, tl.trans(y_b), acc, PRECISION)
        if STATS:
            if tile_b == 0:
                total, square, off = _sums(a, y_a, mask_a)
                total_a += total
                square_a += square
                off_a += off
            if tile_a == 0:
                total, square, off = _sums(b, y_b, mask_b)
                total_b += total
                square_b += square
                off_b += off
    mask = (channel_a < channels_a)[:, None] & (channel_b < channels_b)[None, :]
    out = cross_ptr + split * channels_a * channels_b
    out = out + channel_a.to(tl.int64)[:, None] * channels_b + channel_b[None, :]
    tl.store(out, tl.load(out, mask=mask) + acc.to(tl.float64), mask=mask)
    if STATS:
        if tile_b == 0:
            _flush(stats_a_ptr + split * 3 * channels_a, channel_a, channels_a, total_a, square_a, off_a)
        if tile_a == 0:
            _flush(stats_b_ptr + split * 3 * channels_b, channel_b, channels_b, total_b, square_b, off_b)


@triton.jit
def _stats_kernel(
    x_ptr,  # (B, C, *spatial)
    sizes,
    strides,
    stride_c,
    shift_ptr,  # (C,) float32
    stats_ptr,  # (splits, 3, C) float64
    channels,
    samples,
    DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1).to(tl.int64)
    shift = tl.load(shift_ptr + channel, mask=channel < channels, other=0.0)
    # Sample numbers are of the type of ``samples``: they are divided by sizes, which takes a call in 64 bits.
    span = tl.cdiv(tl.cdiv(samples, CHUNK), tl.num_programs(1)) * CHUNK
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, samples)
    for chunk in range(begin, stop, CHUNK):
        end = tl.minimum(chunk + CHUNK, stop)
        # Written out as in the kernel above, for the same reason.
        total = tl.zeros((BLOCK_C,), tl.float32)
        square = tl.zeros((BLOCK_C,), tl.float32)
        off = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(chunk, end, BLOCK_T):
            sample = start + tl.arange(0, BLOCK_T)
            x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, end, DIMS)
            y = tl.where(mask, x - shift[:, None], 0.0)
            total_t, square_t, off_t = _sums(x, y, mask)
            total += total_t
            square += square_t
            off += off_t
        _flush(stats_ptr + split * 3 * channels, channel, channels, total, square, off)


def sample_layout(
    x: torch.Tensor, dim: int
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], int, int]:
    """(x or a copy, sizes, strides, channel stride, dimensions): sample dimensions merged where they can be.

    A view with more than three separate sample dimensions (nothing a network makes) is copied.
    """
    dim %= x.ndim
    sizes: list[int] = []
    strides: list[int] = []
    for d in range(x.ndim):
        if d == dim or x.shape[d] == 1:
            continue
        if sizes and strides[-1] == x.shape[d] * x.stride(d):
            sizes[-1] *= x.shape[d]
            strides[-1] = x.stride(d)
        else:
            sizes.append(x.shape[d])
            strides.append(x.stride(d))
    if len(sizes) > 3:
        return sample_layout(x.movedim(dim, 0).contiguous(), 0)
    dims = max(len(sizes), 1)
    pad = 3 - len(sizes)
    return x, (1,) * pad + tuple(sizes), (0,) * pad + tuple(strides), x.stride(dim), dims


def _splits(tiles: int, chunks: int, target: Target) -> int:
    """Into how many programs the chunks of samples are split: at most two waves, as even as whole chunks allow."""
    splits = min(chunks, max(2 * target.processors // tiles, 1))
    return ceil_div(chunks, ceil_div(chunks, splits))


def stats_tiles(stride_c: int, *, aligned: bool = True) -> Tiles:
    """(channels, -, samples) of one step: along whichever is contiguous."""
    if stride_c == 1:
        # Eight warps: with four, half precision spills on sm_90 by Triton 3.7.
        return Tiles(64, 1, 32, 8, 2)
    # Without alignment each element's address is in a register.
    return Tiles(8 if aligned else 4, 1, 256, 4, 2)


def add_statistics(
    x: torch.Tensor, dim: int, shift: torch.Tensor, stats: torch.Tensor, target: Target
) -> None:
    """Add the sums around ``shift`` (C,) float32 of one model's activations to ``stats`` (3, C) float64."""
    x, sizes, strides, stride_c, dims = sample_layout(x, dim)
    channels = shift.shape[0]
    samples = sizes[0] * sizes[1] * sizes[2]
    tiles = stats_tiles(stride_c, aligned=is_aligned((x,), (*sizes, *strides, stride_c)))
    blocks = ceil_div(channels, tiles.rows)
    splits = _splits(blocks, max(ceil_div(samples, CHUNK), 1), target)
    parts = stats[None] if splits == 1 else stats.new_zeros(splits, 3, channels)
    _stats_kernel[(blocks, splits)](
        x,
        sizes,
        strides,
        stride_c,
        shift,
        parts,
        channels,
        samples,
        DIMS=dims,
        CHUNK=CHUNK,
        BLOCK_C=tiles.rows,
        BLOCK_T=tiles.depth,
        **tiles.options,
    )
    if splits > 1:
        stats += parts.sum(dim=0)


def _cross(
    first: Model, second: Model, dim: int, cross: torch.Tensor, with_stats: bool, precision: str
) -> None:
    (a, shift_a, stats_a), (b, shift_b, stats_b) = first, second
    target = target_of(a.device)
    a, a_sizes, a_strides, a_stride_c, a_dims = sample_layout(a, dim)
    b, b_sizes, b_strides, b_stride_c, b_dims = sample_layout(b, dim)
    channels_a, channels_b = cross.shape
    samples = a_sizes[0] * a_sizes[1] * a_sizes[2]
    numbers = (*a_sizes, *a_strides, a_stride_c, *b_sizes, *b_strides, b_stride_c)
    aligned = is_aligned((a, b), numbers)
    tiles = matmul_tiles(channels_a, channels_b, precision, target, CROSS, aligned=aligned)
    grid = (ceil_div(channels_a, tiles.rows), ceil_div(channels_b, tiles.columns))
    # One chunk a program: a loop over chunks would keep the accumulator's addresses in registers. Few channels make few
    # tiles, so their chunks are shorter, and there are programs for every processor.
    tiles_all = grid[0] * grid[1]
    chunk = CHUNK if tiles_all * ceil_div(samples, CHUNK) >= 2 * target.processors else CHUNK // 4
    chunks = ceil_div(samples, chunk)
    splits = min(chunks, max(2 * target.processors // tiles_all, 1))
    outs = [cross, stats_a, stats_b] if with_stats else [cross]
    parts = [x[None] if splits == 1 else x.new_zeros(splits, *x.shape) for x in outs]
    parts += parts[:1] * (3 - len(parts))  # unused pointers
    for start in range(0, chunks, splits):
        _cross_kernel[(*grid, min(splits, chunks - start))](
            a,
            b,
            a_sizes,
            a_strides,
            a_stride_c,
            b_sizes,
            b_strides,
            b_stride_c,
            shift_a,
            shift_b,
            parts[1],
            parts[2],
            parts[0],
            channels_a,
            channels_b,
            samples,
            start * chunk,
            STATS=with_stats,
            DIMS_A=a_dims,
            DIMS_B=b_dims,
            PRECISION=dot_precision(precision, target),
            CHUNK=chunk,
            BLOCK_A=tiles.rows,
            BLOCK_B=tiles.columns,
            BLOCK_T=tiles.depth,
            **tiles.options,
        )
    if splits > 1:
        for out, part in zip(outs, parts, strict=False):
            out += part.sum(dim=0)


def moments_update(arguments: MomentsArguments) -> None:
    """Take float32, bfloat16 or float16 activations.

    Raises:
        TypeError: activations of another dtype.
    """
    for name, (x, _, _) in zip("ab", arguments.models, strict=False):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {DTYPES} on the Triton backend, got {x.dtype}")
    if all(x.numel() == 0 for x, _, _ in arguments.models):
        return
    models = [(x, shift.float(), stats) for x, shift, stats in arguments.models]
    dim, precision = arguments.dim, arguments.precision
    if arguments.ab is None:
        for x, shift, stats in models:
            add_statistics(x, dim, shift, stats, target_of(x.device))
    for out, i, j in arguments.products:
        # The product between the models reads both, so it takes their statistics along.
        _cross(models[i], models[j], dim, out, with_stats=i != j, precision=precision)
