"""Streaming moments of two models' activations, both read from their own strides.

    stats += (sum_t y, sum_t y^2, #{x <= 0}),  cross += sum_t y_a y_b^T,  with y = x - shift

Products accumulate in float32 over at most CHUNK samples and are then added to float64 accumulators, so the
error does not grow with the data. Activations of shape (B, C, *spatial) are addressed through up to three
sample dimensions; contiguous, channels-last and cropped maps need no copy.

Few channels (below PACKED_CHANNELS) are read once, by one kernel: the statistics ride along with the product, the programs of
the first column of tiles add up A's, those of the first row B's. A product inside one model ("aa", "bb") is a launch of its
own and reads its model again. Such a product is bound by memory.

With more channels every activation enters many tiles, so it is packed first, as factors are (``_triton/packing.py``): one
kernel sums the statistics and finds each channel's largest value, one writes shifted and scaled float16 channel by channel,
and the products read that. It is packed for WORKSPACE bytes of samples at a time, once for all products.

Chunks in flight together have accumulators of their own, which are added in order at the end. No atomics: the result is
deterministic.

Bytes: few channels, as a GEMM, ``T C (tiles_b + tiles_a)`` elements through L2, each activation at least once from memory; else
each activation twice, and its packed form once written and read as in a GEMM; 16 bytes of float64 accumulator per
element and CHUNK samples. Operations: ``2 T C_a C_b``, three times for "fp16x3".
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.packing import DEPTH, ROWS, Packed, store_scaled
from fastmatch_kernels._triton.product import (
    dot,
    factor_arguments,
    output_tile,
    plan_product,
    product_tile,
    scaled,
)
from fastmatch_kernels._triton.tiles import (
    Target,
    Tiles,
    ceil_div,
    dot_precision,
    is_aligned,
    target_of,
)
from fastmatch_kernels.moments.reference import MomentsArguments

__all__ = ["CHUNK", "add_statistics", "moments_update", "sample_layout"]

CHUNK = 4096
"""Samples per float32 accumulator."""

PACKED_CHANNELS = 256
"""Channels of both models from which activations are packed."""

WORKSPACE = 1 << 29
"""Bytes of packed activations."""

UNITS = {"ieee": "ieee", "fp16": "tf32", "fp16x3": "tf32x3"}
"""Products of few channels, whose largest values are not known beforehand: TF32 has the range of float32."""

_TILES = (Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 32, 8, 2))
_DEEP = Tiles(64, 64, 16, 8, 2)
NARROW: dict[str, dict[str, tuple[Tiles, Tiles]]] = {
    # Statistics and two shifts are in registers in addition to the product. The second tile is for data of unknown alignment.
    "sm_80": {"ieee": (Tiles(64, 64, 16, 4, 3), _DEEP), "tf32": _TILES, "tf32x3": (_DEEP, _DEEP)},
    "sm_90": {"ieee": (_DEEP, Tiles(64, 32, 16, 8, 2)), "tf32": _TILES, "tf32x3": _TILES},
    "sm_100": {
        "ieee": (Tiles(64, 32, 16, 8, 3), Tiles(64, 32, 16, 8, 1)),
        "tf32": _TILES,
        "tf32x3": (_TILES[0], Tiles(64, 64, 16, 4, 2)),
    },
    "gfx942": dict.fromkeys(UNITS.values(), (Tiles(64, 64, 32, 4, 2), Tiles(128, 64, 16, 8, 2))),
    "interpreter": dict.fromkeys(UNITS.values(), (Tiles(32, 32, 32, 4, 1), Tiles(32, 32, 32, 4, 1))),
}
"""Target -> precision of the units -> tiles of a product of few channels."""

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
    stats_a_ptr,  # (3, C_a) float64 of the first split
    stats_b_ptr,  # (3, C_b) float64 of the first split
    cross_ptr,  # (C_a, C_b) float64 of the first split
    channels_a,
    channels_b,
    samples,
    first,  # sample that this launch starts from
    split_stride,  # from the results of one split to those of the next
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
    out = cross_ptr + split * split_stride
    out = out + channel_a.to(tl.int64)[:, None] * channels_b + channel_b[None, :]
    tl.store(out, tl.load(out, mask=mask) + acc.to(tl.float64), mask=mask)
    if STATS:
        if tile_b == 0:
            _flush(stats_a_ptr + split * split_stride, channel_a, channels_a, total_a, square_a, off_a)
        if tile_a == 0:
            _flush(stats_b_ptr + split * split_stride, channel_b, channels_b, total_b, square_b, off_b)


@triton.jit
def _stats_kernel(
    x_ptr,  # (B, C, *spatial)
    sizes,
    strides,
    stride_c,
    shift_ptr,  # (C,) float32
    stats_ptr,  # (splits, 3, C) float64
    largest_ptr,  # (splits, C) float32, or None
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
    largest = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
    for chunk in range(begin, stop, CHUNK):
        end = tl.minimum(chunk + CHUNK, stop)
        # Every element of the tile has sums of its own: a sum over the tile costs more than reading it.
        total = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
        square = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
        off = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
        for start in range(chunk, end, BLOCK_T):
            sample = start + tl.arange(0, BLOCK_T)
            x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, sample, end, DIMS)
            y = tl.where(mask, x - shift[:, None], 0.0)
            total += y
            square += y * y
            off += ((x <= 0) & mask).to(tl.float32)
            if largest_ptr is not None:
                largest = tl.maximum(largest, tl.abs(y))
        sums = tl.sum(total, 1), tl.sum(square, 1), tl.sum(off, 1)
        _flush(stats_ptr + split * 3 * channels, channel, channels, *sums)
    if largest_ptr is not None:
        tl.store(largest_ptr + split * channels + channel, tl.max(largest, 1), mask=channel < channels)


@triton.jit
def _pack_kernel(
    x_ptr,  # (B, C, *spatial)
    sizes,
    strides,
    stride_c,
    shift_ptr,  # (C,) float32
    largest_ptr,  # (C,) float32, or None
    high_ptr,  # (C, width)
    low_ptr,  # (C, width), or None
    scale_ptr,  # (C,) float32, or None
    out_strides,  # of a channel and of a sample
    channels,
    first,  # sample of the first column
    samples,  # end of all samples
    width,  # columns; zeros where there are no samples
    DIMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_channel = channel < channels
    shift = tl.load(shift_ptr + channel, mask=in_channel, other=0.0)
    x, mask = _load(x_ptr, sizes, strides, stride_c, channel, channels, first + column, samples, DIMS)
    y = tl.where(mask, x - shift[:, None], 0.0)
    at = channel.to(tl.int64)[:, None] * out_strides[0] + column.to(tl.int64)[None, :] * out_strides[1]
    inside = in_channel[:, None] & (column < width)[None, :]
    if largest_ptr is None:
        tl.store(high_ptr + at, y, mask=inside)
    else:
        largest = tl.load(largest_ptr + channel, mask=in_channel, other=0.0)
        is_first = tl.program_id(1) == 0
        store_scaled(y, largest, channel, in_channel, at, inside, is_first, high_ptr, low_ptr, scale_ptr)


@triton.jit
def _packed_cross_kernel(
    factors,
    cross_ptr,  # (splits, C_a, C_b) float64
    channels_a,
    channels_b,
    chunk,  # samples of a program
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    _tile, row, column = output_tile(channels_a, channels_b, GROUP, BLOCK_M, BLOCK_N)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, factors[6])
    acc = product_tile(
        factors, row, column, channels_a, channels_b, begin, end, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    acc = scaled(acc, factors, row, column, channels_a, channels_b)
    out = cross_ptr + tl.program_id(1).to(tl.int64) * channels_a * channels_b
    out = out + row.to(tl.int64)[:, None] * channels_b + column[None, :]
    mask = (row < channels_a)[:, None] & (column < channels_b)[None, :]
    tl.store(out, tl.load(out, mask=mask) + acc.to(tl.float64), mask=mask)


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


def _chunk(tiles: int, samples: int, target: Target) -> int:
    """Return CHUNK, or a quarter of it where few channels make so few tiles that processors would be idle."""
    return CHUNK if tiles * ceil_div(samples, CHUNK) >= 2 * target.processors else CHUNK // 4


def _splits(tiles: int, chunks: int, target: Target) -> int:
    """Into how many programs the chunks of samples are split: at most two waves, as even as whole chunks allow."""
    splits = min(chunks, max(2 * target.processors // tiles, 1))
    return ceil_div(chunks, ceil_div(chunks, splits))


def stats_tiles(stride_c: int, target: Target, *, aligned: bool = True) -> Tiles:
    """(channels, -, samples) of one step: along whichever is contiguous, 16 or 32 elements a thread, so that many reads are in flight."""
    if stride_c == 1:
        return Tiles(64, 1, 128, 8, 1)
    # Without alignment each element's address is in a register.
    # Eight warps spill half precision on sm_80.
    return Tiles(8, 1, 512, 4 if target.name == "sm_80" else 8, 1) if aligned else Tiles(4, 1, 256, 4, 1)


def pack_tiles(stride_c: int, *, scaled: bool) -> Tiles:
    """(channels, -, samples) of one program: as wide as reads and writes can be."""
    return Tiles(64, 1, 64, 8, 1) if stride_c == 1 or not scaled else Tiles(8, 1, 512, 4, 1)


def add_statistics(
    x: torch.Tensor,
    dim: int,
    shift: torch.Tensor,
    stats: torch.Tensor,
    target: Target,
    *,
    with_largest: bool = False,
) -> torch.Tensor | None:
    """Add the sums around ``shift`` (C,) float32 of one model's activations to ``stats`` (3, C) float64.

    Returns:
        (C,) float32, each channel's largest absolute value less the shift, if asked for.
    """
    x, sizes, strides, stride_c, dims = sample_layout(x, dim)
    channels = shift.shape[0]
    samples = sizes[0] * sizes[1] * sizes[2]
    tiles = stats_tiles(stride_c, target, aligned=is_aligned((x,), (*sizes, *strides, stride_c)))
    blocks = ceil_div(channels, tiles.rows)
    chunk = _chunk(blocks, samples, target)
    splits = _splits(blocks, max(ceil_div(samples, chunk), 1), target)
    parts = stats[None] if splits == 1 else stats.new_zeros(splits, 3, channels)
    largest = torch.empty(splits, channels, device=x.device) if with_largest else None
    _stats_kernel[(blocks, splits)](
        x,
        sizes,
        strides,
        stride_c,
        shift,
        parts,
        largest,
        channels,
        samples,
        DIMS=dims,
        CHUNK=chunk,
        BLOCK_C=tiles.rows,
        BLOCK_T=tiles.depth,
        **tiles.options,
    )
    if splits > 1:
        stats += parts.sum(dim=0)
    return None if largest is None else largest[0] if splits == 1 else largest.amax(0)


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
    tiles = NARROW[target.name][UNITS[precision]][0 if aligned else 1]
    grid = (ceil_div(channels_a, tiles.rows), ceil_div(channels_b, tiles.columns))
    # One chunk a program: a loop over chunks would keep the accumulator's addresses in registers.
    tiles_all = grid[0] * grid[1]
    chunk = _chunk(tiles_all, samples, target)
    chunks = ceil_div(samples, chunk)
    splits = min(chunks, max(2 * target.processors // tiles_all, 1))
    outs = [cross, stats_a, stats_b] if with_stats else [cross]
    sizes = [x.numel() for x in outs]
    parts_of_all = cross.new_zeros(splits if splits > 1 else 0, sum(sizes))
    parts, split_stride = (parts_of_all[0].split(sizes), sum(sizes)) if splits > 1 else (outs, 0)
    parts = [*parts, *[parts[0]] * (3 - len(parts))]  # unused pointers
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
            split_stride,
            STATS=with_stats,
            DIMS_A=a_dims,
            DIMS_B=b_dims,
            PRECISION=dot_precision(UNITS[precision], target),
            CHUNK=chunk,
            BLOCK_A=tiles.rows,
            BLOCK_B=tiles.columns,
            BLOCK_T=tiles.depth,
            **tiles.options,
        )
    if splits > 1:
        for out, part in zip(outs, parts_of_all.sum(0).split(sizes), strict=True):
            out += part.view(out.shape)


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
    target = target_of(models[0][0].device)
    least = min(len(shift) for _, shift, _ in models)
    if arguments.products and least >= PACKED_CHANNELS:
        _packed_cross(models, dim, arguments.products, precision, target)
        return
    if arguments.ab is None:
        for x, shift, stats in models:
            add_statistics(x, dim, shift, stats, target)
    for out, i, j in arguments.products:
        # The product between the models reads both, so it takes their statistics along.
        _cross(models[i], models[j], dim, out, with_stats=i != j, precision=precision)


def _packed_cross(
    models: list[Model],
    dim: int,
    products: list[tuple[torch.Tensor, int, int]],
    precision: str,
    target: Target,
) -> None:
    """Add statistics, pack, and add the products: (out, first model, second model)."""
    largest = [
        add_statistics(x, dim, shift, stats, target, with_largest=precision != "ieee")
        for x, shift, stats in models
    ]
    channels = [len(shift) for _, shift, _ in models]
    samples = models[0][0].numel() // channels[0]
    width = max(WORKSPACE // (4 * sum(channels)) // CHUNK, 1) * CHUNK
    for first in range(0, samples, width):
        count = min(width, samples - first)
        packed = [
            _packed(x, dim, shift, most, (first, first + count), precision)
            for (x, shift, _), most in zip(models, largest, strict=True)
        ]
        for out, i, j in products:
            _add_packed(packed[i], packed[j], out, count, precision, target)


def _packed(
    x: torch.Tensor,
    dim: int,
    shift: torch.Tensor,
    largest: torch.Tensor | None,
    part: tuple[int, int],
    precision: str,
) -> Packed:
    """Pack the samples of a part, (channels, samples), filled up with zeros."""
    x, sizes, strides, stride_c, dims = sample_layout(x, dim)
    channels, (first, end) = len(shift), part
    width = ceil_div(end - first, DEPTH) * DEPTH
    if largest is None:
        along = torch.empty(width, ceil_div(channels, ROWS) * ROWS, device=x.device)
        high, low, scale = along.T[:channels], None, None
    else:
        high = torch.empty(channels, width, dtype=torch.float16, device=x.device)
        low = torch.empty_like(high) if precision == "fp16x3" else None
        scale = torch.empty(channels, device=x.device)
    tiles = pack_tiles(stride_c, scaled=largest is not None)
    _pack_kernel[(ceil_div(channels, tiles.rows), ceil_div(width, tiles.depth))](
        x,
        sizes,
        strides,
        stride_c,
        shift,
        largest,
        high,
        low,
        scale,
        high.stride(),
        channels,
        first,
        end,
        width,
        DIMS=dims,
        BLOCK_C=tiles.rows,
        BLOCK_T=tiles.depth,
        **tiles.options,
    )
    return Packed(high, low, scale)


def _add_packed(a: Packed, b: Packed, out: torch.Tensor, count: int, precision: str, target: Target) -> None:
    """Add a product over ``count`` packed samples to ``out`` (C_a, C_b) float64."""
    n, m = out.shape
    _, tiles, constants = plan_product((n, m), torch.float32, precision, out.device, "summed")
    tiles_all = ceil_div(n, tiles.rows) * ceil_div(m, tiles.columns)
    splits = min(ceil_div(count, CHUNK), max(2 * target.processors // tiles_all, 1))
    parts = out[None] if splits == 1 else out.new_zeros(splits, n, m)
    for start in range(0, count, splits * CHUNK):
        stop = min(start + splits * CHUNK, count)
        part = slice(start, ceil_div(stop, DEPTH) * DEPTH)
        here = [Packed(x.high[:, part], None if x.low is None else x.low[:, part], x.scale) for x in (a, b)]
        _packed_cross_kernel[(tiles_all, ceil_div(stop - start, CHUNK))](
            factor_arguments(*here), parts, n, m, CHUNK, **constants
        )
    if splits > 1:
        out += parts.sum(dim=0)
