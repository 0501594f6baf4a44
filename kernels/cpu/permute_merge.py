"""Permute and merge on CPU: every weight read once, the result written once, no permuted copy between.

A weight is seen as (outer, n1, middle, length): whole runs of ``length`` elements move by the first index;
within a run, blocks of ``block`` elements by the second. A task takes as many runs as fill 8 bytes an element,
which stay in cache: what moves within them moves for all at once, as integers. They are summed in short parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from fastmatch.kernels.cpu.half import HALF, decode, encode
from fastmatch.kernels.reference import permute_merge as reference

__all__ = ["permute_merge"]

PART = 1024
"""Elements of a run that are summed before they are written."""


@numba.njit(cache=True, nogil=True)
def _pack(weight, sources, words):
    """Word j holds element j of each run in ``sources``, the first lowest: 8 bytes are moved for one index."""
    if sources.shape[0] == 4:
        a, b, c, d = weight[sources[0]], weight[sources[1]], weight[sources[2]], weight[sources[3]]
        for j in range(words.shape[0]):
            low = np.uint64(a[j]) | np.uint64(b[j]) << np.uint64(16)
            words[j] = low | np.uint64(c[j]) << np.uint64(32) | np.uint64(d[j]) << np.uint64(48)
    elif sources.shape[0] == 2:
        a, b = weight[sources[0]], weight[sources[1]]
        for j in range(words.shape[0]):
            words[j] = np.uint64(a[j]) | np.uint64(b[j]) << np.uint64(32)
    else:
        a = weight[sources[0]]
        for j in range(words.shape[0]):
            words[j] = np.uint64(a[j])


@numba.njit(cache=True, nogil=True)
def _gather(words, index, moved):
    for j in range(index.shape[0]):
        moved[j] = words[index[j]]


@numba.njit(cache=True, nogil=True)
def _unpack(bits, shift, run):
    for j in range(run.shape[0]):
        run[j] = bits[j] if shift is None else bits[j] >> shift


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _add(bits, shift, half, alpha, fresh, total):
    """``total (+)= alpha * the numbers in bits``, words shifted first where ``shift`` is not None; ``fresh`` overwrites."""
    for j in range(total.shape[0]):
        value = alpha * decode(bits[j] if shift is None else bits[j] >> shift, half, alpha)
        total[j] = value if fresh else total[j] + value


@numba.njit(cache=True, nogil=True)
def _write(total, half, run):
    for j in range(run.shape[0]):
        run[j] = encode(total[j], half)


@numba.njit(parallel=True, cache=True, nogil=True)
def _merge(weights, alphas, rows, columns, half, lanes, out, tasks):
    """out (R, L) = sum_k alphas[k] * weights[k][rows[k]][:, columns[k]]; an empty index leaves an axis in place.

    Weights and result are unsigned integers, ``lanes`` of them to 8 bytes.
    """
    runs, length = out.shape
    count = len(weights)
    groups = (runs + lanes - 1) // lanes
    width = np.uint64(64 // lanes)
    only_moved = count == 1 and alphas[0] == 1.0
    for task in numba.prange(tasks):
        words = np.empty(length, np.uint64)
        moved = np.empty((count, length), np.uint64)
        sources = np.empty(lanes, np.int64)
        total = np.empty(PART, alphas.dtype)
        for group in range(groups * task // tasks, groups * (task + 1) // tasks):
            first = group * lanes
            last = min(first + lanes, runs)
            for k in range(count):
                if columns[k].shape[0] > 0:
                    # The last group may be short: its last run stands for those missing.
                    for g in range(lanes):
                        sources[g] = rows[k][min(first + g, runs - 1)]
                    _pack(weights[k], sources, words)
                    _gather(words, columns[k], moved[k])
            for r in range(first, last):
                shift = np.uint64(r - first) * width
                if only_moved:
                    if columns[0].shape[0] == 0:
                        _unpack(weights[0][rows[0][r]], None, out[r])
                    else:
                        _unpack(moved[0], shift, out[r])
                    continue
                for start in range(0, length, PART):
                    # Slices: a loop from 0 is known to need no look at negative indices.
                    stop = min(start + PART, length)
                    part = total[: stop - start]
                    for k in range(count):
                        if columns[k].shape[0] == 0:
                            run = weights[k][rows[k][r]]
                            _add(run[start:stop], None, half, alphas[k], k == 0, part)
                        else:
                            _add(moved[k, start:stop], shift, half, alphas[k], k == 0, part)
                    _write(part, half, out[r, start:stop])


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
    bits = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[out.element_size()]
    _merge(
        tuple(w.contiguous().view(-1, length).view(bits).numpy() for w in weights),
        np.array(alphas, np.float64 if out.dtype == torch.float64 else np.float32),
        tuple(r.numpy() for r in rows),
        tuple(columns),
        half,
        8 // out.element_size(),
        target.view(-1, length).view(bits).numpy(),
        min(4 * numba.get_num_threads(), len(rows[0])),
    )
    if target is not out:
        out.copy_(target)
