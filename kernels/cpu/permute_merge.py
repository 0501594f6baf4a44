"""Permute and merge on CPU: every weight read once, the result written once, no permuted copy between.

A weight is seen as (outer, n1, middle, length): whole runs of ``length`` elements move by the first index;
within a run, blocks of ``block`` elements by the second. One task per run, which stays in cache while its
elements are gathered. float16, which numba cannot compute with, goes through torch in runs that fit in cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from fastmatch.kernels.reference import permute_merge as reference

__all__ = ["permute_merge"]

BFLOAT16, FLOAT16 = 1, 2
HALF = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
"""Types that numba cannot compute with come as uint16. For the others ``half`` is None, and numba compiles
without the branches that it would take."""


@numba.njit(cache=True, nogil=True)
def _decode(bits, half):
    """float32 of a bfloat16 or float16 given as uint16."""
    if half == BFLOAT16:
        return np.uint32(np.uint32(bits) << 16).view(np.float32)
    # 2^112 moves float16's exponent bias to float32's, subnormal numbers included.
    value = np.float32(np.uint32((np.uint32(bits) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112))
    magnitude = np.uint32(np.float32(value).view(np.uint32))
    if bits & 0x7C00 == 0x7C00:  # inf and NaN
        magnitude = np.uint32(0x7F800000 | ((np.uint32(bits) & 0x3FF) << 13))
    return np.uint32(magnitude | ((np.uint32(bits) & 0x8000) << 16)).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _encode(value, half):
    """bfloat16 or float16 bits of a float32, rounded to nearest, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if half == BFLOAT16:
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.uint16(0x7FC0) if np.isnan(value) else np.uint16(rounded)
    # No product: one that falls below float32's normal numbers costs a hundred cycles.
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Below 2^-14 adding 0.5 brings the last place to 2^-24, float16's own, with the hardware's rounding.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
    rounded = np.uint32(shifted - np.uint32(0x3F000000)) if magnitude < np.uint32(0x38800000) else rounded
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded  # 65520 and inf
    rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else rounded  # NaN
    return np.uint16(rounded | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))


@numba.njit(cache=True, nogil=True)
def _stage(weight, source, half, row):
    """Reads one run from front to back, which memory does best, into a row that stays in cache."""
    for j in range(row.shape[0]):
        if half is None:
            row[j] = weight[source, j]
        elif half == BFLOAT16:
            row[j] = _decode(weight[source, j], BFLOAT16)
        else:
            row[j] = _decode(weight[source, j], FLOAT16)


@numba.njit(cache=True, nogil=True)
def _add_half_run(weight, source, half, alpha, fresh, row):
    """``row (+)= alpha *`` one run of a half-precision weight, straight from memory; ``fresh`` overwrites."""
    for j in range(row.shape[0]):
        if half == BFLOAT16:
            value = alpha * _decode(weight[source, j], BFLOAT16)
        else:
            value = alpha * _decode(weight[source, j], FLOAT16)
        row[j] = value if fresh else row[j] + value


@numba.njit(parallel=True, cache=True, nogil=True)
def _merge(weights, alphas, rows, columns, half, sums, out, tasks):
    """out (R, L) = sum_k alphas[k] * weights[k][rows[k]][:, columns[k]].

    Sums run in ``sums``: the result itself where it has the type for it, else one row a task.
    """
    runs, length = out.shape
    per_task = (runs + tasks - 1) // tasks
    for task in numba.prange(tasks):
        staged = np.empty(length, alphas.dtype)
        for r in range(task * per_task, min((task + 1) * per_task, runs)):
            row = sums[r] if half is None else sums[task]
            for k in range(len(weights)):
                weight = weights[k]
                alpha = alphas[k]
                source = rows[k][r]
                index = columns[k]
                if index.shape[0] == 0 and half is None:
                    if k == 0:
                        for j in range(length):
                            row[j] = alpha * weight[source, j]
                    else:
                        for j in range(length):
                            row[j] += alpha * weight[source, j]
                    continue
                if index.shape[0] == 0:
                    if half is not None:
                        _add_half_run(weight, source, half, alpha, k == 0, row)
                    continue
                _stage(weight, source, half, staged)
                if k == 0:
                    for j in range(length):
                        row[j] = alpha * staged[index[j]]
                else:
                    for j in range(length):
                        row[j] += alpha * staged[index[j]]
            if half is not None:
                for j in range(length):
                    out[r, j] = _encode(row[j], half)


def _as_runs(
    shape: torch.Size, dims: Sequence[int], blocks: Sequence[int], two: bool
) -> tuple[int, int, int, int, int]:
    """(outer, n1, middle, length, block): the run's length and the second axis's block within it.

    Where only the first axis moves, everything behind it is one run.
    """
    d1, d2 = dims
    if not two:
        return math.prod(shape[:d1]), shape[d1], 1, math.prod(shape[d1 + 1 :]), 1
    tail = math.prod(shape[d2 + 1 :])
    return (
        math.prod(shape[:d1]),
        shape[d1],
        math.prod(shape[d1 + 1 : d2]),
        shape[d2] * tail,
        blocks[1] * tail,
    )


def source_runs(
    shape: torch.Size, index: torch.Tensor | None, dims: Sequence[int], blocks: Sequence[int], two: bool
) -> torch.Tensor:
    """For every run of the result, the run of the weight that it comes from."""
    outer, n1, middle, _, _ = _as_runs(shape, dims, blocks, two)
    first = torch.arange(n1) if index is None else reference.expand_blocks(index, blocks[0])
    runs = torch.arange(outer)[:, None, None] * n1 + first[None, :, None]
    return (runs * middle + torch.arange(middle)).flatten()


def permute_merge(
    weights: list[torch.Tensor],
    alphas: list[float],
    first: list[torch.Tensor | None],
    second: list[torch.Tensor | None],
    dims: Sequence[int],
    blocks: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Writes the merge to ``out``. Arguments as in the reference.

    Bytes: (len(weights) + 1) times one weight, plus the indices.
    """
    if out.numel() == 0:
        return
    shape = out.shape
    two = any(index is not None for index in second)
    *_, length, block = _as_runs(shape, dims, blocks, two)
    rows = [source_runs(shape, index, dims, blocks, two) for index in first]
    # Unsigned, so that no negative index has to be looked for.
    none = np.empty(0, np.uint32)
    columns = [
        none if index is None else reference.expand_blocks(index, block).numpy().astype(np.uint32)
        for index in second
    ]
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    half = HALF.get(out.dtype)
    bits = out.dtype if half is None else torch.uint16
    tasks = min(4 * numba.get_num_threads(), len(rows[0]))
    result = target.view(-1, length).view(bits).numpy()
    _merge(
        tuple(w.contiguous().view(-1, length).view(bits).numpy() for w in weights),
        np.array(alphas, np.float64 if out.dtype == torch.float64 else np.float32),
        tuple(r.numpy() for r in rows),
        tuple(columns),
        half,
        result if half is None else np.empty((tasks, length), np.float32),
        result,
        tasks,
    )
    if target is not out:
        out.copy_(target)
