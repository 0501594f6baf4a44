"""Permute and merge on CPU: each weight is read once and the result is written once, without a permuted copy.

A weight is seen as (outer, n1, middle, length). The first index moves whole runs of ``length`` elements; the second moves
blocks of ``block`` elements within a run. As many runs are taken at a time as fill 16 bytes per element, and elements
move for all of them at once, as integers, in the caches. One or two weights are combined in one loop, more in short parts.
A large result is written by non-temporal stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from fastmatch_kernels._numba import nontemporal
from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.half import HALF, HARDWARE, decode, encode
from fastmatch_kernels._numba.llvm import borrowed, flat
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels._numba.register_transpose import BYTES, from_words, to_words
from fastmatch_kernels.permute_merge import reference
from fastmatch_kernels.permute_merge.reference import MergeArguments

__all__ = ["permute_merge"]

PART = 1024
"""Elements of a run that are summed before they are written."""

BLOCK = 16
"""Blocks of at least this many elements are copied one by one; smaller ones are gathered."""

PREFETCH_BYTES = 2048
"""Distance of prefetches: the processor's own prefetcher stops at the end of a page."""

BLOCK_ENTRIES = 1 << 16
"""Entries of a thread's block at least: some 30 us of work."""

NONTEMPORAL_BYTES = 1 << 23
"""Results of at least this size are written by non-temporal stores: the caches could not hold them."""


@njit(inner=True, nogil=True)
def _move_columns(weight, starts, columns, words, moved):
    """``moved[g, j] = weight.flat[starts[g] + columns[j]]`` for as many runs as there are lanes.

    Row j of ``words`` holds element j of each run, so one look at an index moves an element of all of them.
    """
    length, lanes = words.shape
    whole = length - length % (2 * lanes)
    run = flat(weight)
    for j in range(0, whole, 2 * lanes):
        to_words(weight, starts, j, words)
    for j in range(whole, length):
        for g in range(lanes):
            words[j, g] = run[starts[g] + j]
    for j in range(0, whole, 2 * lanes):
        from_words(words, columns, j, moved)
    for j in range(whole, length):
        for g in range(lanes):
            moved[g, j] = words[columns[j], g]


@njit(inner=True, nogil=True)
def _move_blocks(run, starts, block, near, moved):
    """Copy the blocks of ``block`` elements that begin at ``starts`` in a run to ``moved``, one after another.

    The run is first copied in order to ``near``: short blocks in random order are read from memory at a third of its speed.
    """
    _copy(run, near)
    for i in range(starts.shape[0]):
        _copy(near[starts[i] : starts[i] + block], moved[i * block : (i + 1) * block])


@njit(inner=True, nogil=True)
def _copy(bits, run):
    for j in range(run.shape[0]):
        run[j] = bits[j]


@njit(inner=True, nogil=True, fastmath={"contract"})
def _mean_of_two(x, y, half, alpha, beta, run):
    """``run = alpha x + beta y`` in one loop, so that conversions overlap with waiting for memory."""
    for j in range(run.shape[0]):
        run[j] = encode(alpha * decode(x[j], half, alpha) + beta * decode(y[j], half, beta), half)


@njit(inner=True, nogil=True)
def _edges(run):
    """Where the aligned part of a run begins and ends."""
    lanes = nontemporal.BYTES // run.itemsize
    head = min(nontemporal.misaligned(run), run.shape[0])
    return head, head + (run.shape[0] - head) // lanes * lanes


@njit(inner=True, nogil=True)
def _copy_nontemporal(bits, run):
    """As :func:`_copy`, by non-temporal stores."""
    head, tail = _edges(run)
    _copy(bits[:head], run[:head])
    for j in range(head, tail, nontemporal.BYTES // run.itemsize):
        nontemporal.copy(bits, run, j)
    _copy(bits[tail:], run[tail:])


@njit(inner=True, nogil=True)
def _mean_nontemporal(x, y, half, alpha, beta, run, next_x, next_y):
    """As :func:`_mean_of_two`, by non-temporal stores; ``next_x`` says whether what follows x in memory is needed next."""
    head, tail = _edges(run)
    ahead_x = PREFETCH_BYTES // run.itemsize if next_x else 0
    ahead_y = PREFETCH_BYTES // run.itemsize if next_y else 0
    if head > 0:
        _mean_of_two(x[:head], y[:head], half, alpha, beta, run[:head])
    for j in range(head, tail, nontemporal.BYTES // run.itemsize):
        nontemporal.prefetch(x, j + ahead_x)
        nontemporal.prefetch(y, j + ahead_y)
        nontemporal.mean(x, y, half, alpha, beta, run, j)
    if tail < run.shape[0]:
        _mean_of_two(x[tail:], y[tail:], half, alpha, beta, run[tail:])


@njit(inner=True, nogil=True)
def _follows(rows, r):
    """Whether the run that is needed after r's is its neighbour in memory."""
    return r + 1 < rows.shape[0] and rows[r + 1] == rows[r] + 1


@njit(inner=True, nogil=True, fastmath={"contract"})
def _add(bits, half, alpha, fresh, total):
    """``total (+)= alpha * the numbers in bits``; ``fresh`` overwrites."""
    for j in range(total.shape[0]):
        value = alpha * decode(bits[j], half, alpha)
        total[j] = value if fresh else total[j] + value


@njit(inner=True, nogil=True)
def _write(total, half, bits):
    for j in range(bits.shape[0]):
        bits[j] = encode(total[j], half)


@njit(nogil=True)
def _merge(
    given, alphas, first_index, second_index, block, half, result, in_place, nontemporal_stores, lo, hi
):
    """result (R, L) = sum_k alphas[k] * given[k][first_index[k]][:, second_index[k]]; an empty second index moves nothing.

    Weights and result are unsigned integers. The second index is of elements where ``block`` is 1, else the starts of blocks.
    Only the groups lo to hi of as many runs as fill ``BYTES`` bytes per element are computed.
    """
    runs, length = result.shape
    count = len(given)
    weights, rows, columns, out = (
        borrowed(given),
        borrowed(first_index),
        borrowed(second_index),
        borrowed(result),
    )
    lanes = BYTES // result.itemsize
    only_moved = count == 1 and alphas[0] == 1.0
    held = 0  # elements of a run that are held while they move
    for k in range(count):
        held = max(held, length if columns[k].shape[0] > 0 else 0)
    words = np.empty((held, lanes) if block == 1 else (1, held), out.dtype)
    # Rows a multiple of 4096 bytes apart would share one set of the cache, which holds hardly more than there are.
    moved = np.empty((count, lanes, held + 64 // out.itemsize if held else 0), out.dtype)
    starts = np.empty(lanes, np.int64)
    total = np.empty(PART, alphas.dtype)
    for group in range(lo, hi):
        first = group * lanes
        last = min(first + lanes, runs)
        for k in range(count):
            if columns[k].shape[0] > 0:
                if block > 1:
                    for r in range(first, last):
                        run = weights[k][rows[k][r]]
                        _move_blocks(run, columns[k], block, words[0], moved[k, r - first, :length])
                else:
                    # The last group may be short: its last run is repeated for the missing ones.
                    for g in range(lanes):
                        starts[g] = rows[k][min(first + g, runs - 1)] * length
                    _move_columns(weights[k], starts, columns[k], words, moved[k])
        for r in range(first, last):
            x = moved[0, r - first, :length] if columns[0].shape[0] else weights[0][rows[0][r]]
            if only_moved:
                if nontemporal_stores:
                    _copy_nontemporal(x, out[r])
                else:
                    _copy(x, out[r])
                continue
            # Where the result takes a weight's place, no loop over both could use vectors.
            if count == 2 and not in_place:
                y = moved[1, r - first, :length] if columns[1].shape[0] else weights[1][rows[1][r]]
                if nontemporal_stores:
                    next_x = columns[0].shape[0] == 0 and _follows(rows[0], r)
                    next_y = columns[1].shape[0] == 0 and _follows(rows[1], r)
                    _mean_nontemporal(x, y, half, alphas[0], alphas[1], out[r], next_x, next_y)
                else:
                    _mean_of_two(x, y, half, alphas[0], alphas[1], out[r])
                continue
            for start in range(0, length, PART):
                # Slices: a loop from 0 is known to need no look at negative indices.
                stop = min(start + PART, length)
                part = total[: stop - start]
                for k in range(count):
                    if columns[k].shape[0] == 0:
                        run = weights[k][rows[k][r]]
                    else:
                        run = moved[k, r - first]
                    _add(run[start:stop], half, alphas[k], k == 0, part)
                _write(part, half, out[r, start:stop])
    if nontemporal_stores:
        nontemporal.fence()


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


def _source_runs(
    shape: torch.Size, index: torch.Tensor | None, dims: Sequence[int], blocks: Sequence[int], two: bool
) -> np.ndarray:
    """For every run of the result, the run of the weight that it comes from."""
    outer, n1, middle, _, _ = _as_runs(shape, dims, blocks, two)
    if index is None:
        return np.arange(outer * n1 * middle)
    first = reference.expand_blocks(index, blocks[0]).numpy()
    runs = np.arange(outer)[:, None, None] * n1 + first[:, None]
    return (runs * middle + np.arange(middle)).ravel()


def permute_merge(arguments: MergeArguments) -> None:
    """Move ``len(weights) + 1`` times the bytes of a weight, and the indices."""
    weights, alphas, first, second, dims, blocks, out = arguments
    if out.numel() == 0:
        return
    shape = out.shape
    two = any(index is not None for index in second)
    *_, length, block = _as_runs(shape, dims, blocks, two)
    rows = [_source_runs(shape, index, dims, blocks, two) for index in first]
    if block < BLOCK:
        columns = [None if index is None else reference.expand_blocks(index, block) for index in second]
        block = 1
    else:
        columns = [None if index is None else index * block for index in second]
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    sources = [w.contiguous() for w in weights]
    in_place = any(w.data_ptr() == target.data_ptr() for w in sources)
    factors = np.array(alphas, np.float64 if out.dtype == torch.float64 else np.float32)
    factors[np.isnan(factors)] = np.nan  # the one whose bits bfloat16 can hold
    bits = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[out.element_size()]
    merge = partial(
        _merge,
        tuple(w.view(-1, length).view(bits).numpy() for w in sources),
        factors,
        tuple(rows),
        # Unsigned, so that no negative index has to be looked for.
        tuple(np.empty(0, np.uint32) if c is None else c.numpy().astype(np.uint32) for c in columns),
        block,
        HALF.get(out.dtype),
        target.view(-1, length).view(bits).numpy(),
        in_place,
        # A result that replaces a weight is in the caches when it is written.
        target.nbytes >= NONTEMPORAL_BYTES and not in_place and (HARDWARE or out.dtype != torch.float16),
    )
    groups = -(-len(rows[0]) * out.element_size() // BYTES)
    over_rows(groups, out.numel() * len(sources), merge, BLOCK_ENTRIES)
    if target is not out:
        out.copy_(target)
