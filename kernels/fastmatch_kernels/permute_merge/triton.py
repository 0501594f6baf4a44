# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""Permute and merge on the GPU: ``out = sum_k alpha_k W_k``, each weight read once, the result written once.

As on CPU a weight is (outer, n1, middle, length): runs of ``length`` elements move by the first index, blocks
of ``block`` elements within a run by the second. Where elements are gathered within runs, one program takes
whole runs, so that every sector it touches is used from the first-level cache until nothing of it is left.

Bytes: ``(K + 1)`` times one weight and the indices. Operations: ``2 K`` per element. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.tiles import Target, Tiles, ceil_div, is_aligned, target_of
from fastmatch_kernels.permute_merge.reference import MergeArguments

__all__ = ["permute_merge", "run_tiles", "runs_of"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

HELD = {"cuda": (1024, 16384), "hip": (1024, 8192), "interpreter": (16, 64)}
"""Least and most elements of a run that is gathered on the chip. The interpreter's are few, so that tests reach longer runs."""


@triton.jit
def _permute_merge_kernel(
    weight_ptrs,  # K x (outer, n1, middle, length)
    alphas,  # K numbers
    first_ptrs,  # K x (n1 / block1,) int64, or None
    second_ptrs,  # K x (length / block2,) int64, or None
    out_ptr,  # (outer, n1, middle, length)
    layout,  # what runs_of returns
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    runs, n1, middle, length, block1, block2 = layout
    # One flat grid: CUDA takes 2^31 programs along its first dimension, and 65535 along the others.
    parts = tl.cdiv(length, BLOCK_L * STEPS)
    part = (tl.program_id(0) % parts).to(tl.int64)
    run = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_run = run < runs
    m = run % middle
    i1 = (run // middle) % n1
    outer = run // middle // n1
    for step in range(STEPS):
        j = tl.arange(0, BLOCK_L)  # 32 bits for whole runs, which leaves registers for more programs
        if not WHOLE:
            j = (part * STEPS + step) * BLOCK_L + j
        mask = in_run[:, None] & (j < length)[None, :]
        acc = tl.zeros((BLOCK_R, BLOCK_L), tl.float32)
        for k in tl.static_range(K):
            if first_ptrs[k] is None:
                source = run
            else:
                moved = tl.load(first_ptrs[k] + i1 // block1, mask=in_run, other=0)
                source = (outer * n1 + moved * block1 + i1 % block1) * middle + m
            if second_ptrs[k] is None:
                column = j
            else:
                # A run that is gathered has fewer than 2^31 elements, and 64-bit division takes a call.
                short = j.to(tl.int32)
                moved_block = tl.load(second_ptrs[k] + short // block2, mask=j < length, other=0)
                if WHOLE:
                    moved_block = moved_block.to(tl.int32)
                column = moved_block * block2 + short % block2
            if WHOLE and second_ptrs[k] is not None:
                # One run, read in order and gathered on the chip: read through the index it takes twice the time.
                value = tl.load(weight_ptrs[k] + source[:, None] * length + j[None, :], mask=mask, other=0.0)
                index = tl.where(j < length, column.to(tl.int32), 0)
                value = tl.gather(tl.reshape(value, (BLOCK_L,)), index, 0)[None, :]
            else:
                at = source[:, None] * length + column[None, :]
                value = tl.load(weight_ptrs[k] + at, mask=mask, other=0.0)
            acc += alphas[k] * value.to(tl.float32)
        tl.store(out_ptr + run[:, None] * length + j[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def runs_of(
    shape: tuple[int, ...], dims: Sequence[int], blocks: Sequence[int], first: bool, second: bool
) -> tuple[int, int, int, int, int, int]:
    """(runs, n1, middle, length, block1, block2): how one launch sees a weight of ``shape``."""
    d1, d2 = dims
    numel = math.prod(shape)
    if first and not second:
        length = math.prod(shape[d1 + 1 :])
        if length >= 16:
            return numel // length, shape[d1], 1, length, blocks[0], 1
        # Runs too short for wide loads: the axis is gathered within longer runs instead.
        return math.prod(shape[:d1]), 1, 1, shape[d1] * length, 1, blocks[0] * length
    if not first and not second:
        return 1, 1, 1, numel, 1, 1
    tail = math.prod(shape[d2 + 1 :])
    length = shape[d2] * tail
    return numel // length, shape[d1], math.prod(shape[d1 + 1 : d2]), length, blocks[0], blocks[1] * tail


def run_tiles(
    length: int, gathered: bool, target: Target, *, aligned: bool = True
) -> tuple[Tiles, int, bool]:
    """(tile of runs x elements, steps along a run, whether the tile holds whole runs): whole runs where they are gathered."""
    columns = triton.next_power_of_2(length)
    least, most = HELD[target.backend]
    if gathered and least <= columns <= most:
        return Tiles(1, columns, 1, 8 if columns > 4096 else 4, 1), 1, True
    columns = min(columns, 4096)
    rows = max(2048 // columns, 1)
    steps = ceil_div(length, columns) if gathered else 1
    # Eight warps for short gathered runs of any alignment: with four, gfx942 spills scalar registers.
    warps = 8 if gathered and (columns == 4096 or (rows > 1 and not aligned)) else 4
    return Tiles(rows, columns, 1, warps, 1), min(steps, 16), False


def permute_merge(arguments: MergeArguments) -> None:
    """Take float32, bfloat16 or float16 weights.

    Raises:
        TypeError: weights of another dtype.
    """
    weights, alphas, first, second, dims, blocks, out = arguments
    if out.dtype not in DTYPES:
        raise TypeError(f"weights: expected one of {DTYPES} on the Triton backend, got {out.dtype}")
    device = target_of(out.device)
    if out.numel() == 0:
        return
    any_first, any_second = (any(i is not None for i in indices) for indices in (first, second))
    layout = runs_of(tuple(out.shape), dims, blocks, any_first, any_second)
    runs, _, _, length, _, _ = layout
    if any_first and not any_second and length != math.prod(out.shape[dims[0] + 1 :]):
        first, second = second, first  # short runs: the axis was turned into the second
    gathered = any(i is not None for i in second)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    sources = tuple(w.contiguous() for w in weights)
    aligned = is_aligned((*sources, target), layout)
    tiles, steps, whole = run_tiles(length, gathered, device, aligned=aligned)
    programs = ceil_div(runs, tiles.rows) * ceil_div(length, tiles.columns * steps)
    _permute_merge_kernel[(programs,)](
        sources,
        tuple(float(x) for x in alphas),
        tuple(first),
        tuple(second),
        target,
        layout,
        K=len(weights),
        BLOCK_R=tiles.rows,
        BLOCK_L=tiles.columns,
        STEPS=steps,
        WHOLE=whole,
        **tiles.options,
    )
    if target is not out:
        out.copy_(target)
