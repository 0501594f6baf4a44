# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""Row reductions of ``c_ij - v_j`` for ``c = -(sum_k A_k B_k^T)``: shortlists with a bound, and row minima.

The cost matrix is never stored. Each tile of it is computed in registers. Per row, the tile writes its ``few``
smallest values with their columns, the candidates, and a cut-off: the smallest value that it did not write. A
second kernel selects k of a row's candidates. The minimum of the cut-offs and of the candidates not selected is
the smallest computed value outside the list. The returned bound is this minimum minus the rounding error of the
computation (:func:`product_error`), so it is never above a true value outside the list.

If one tile holds more than ``few`` of a row's k smallest values, the others are missing from the list, and the
bound is at most the smallest of them. So the entries not above the bound are always the row's smallest, in order.

Operations: ``2 n m d`` for the products and about ``4 few n m`` for the picking. Bytes: the factors as in a
GEMM, ``8 few + 4`` bytes per row and tile of columns, taken in chunks of rows within WORKSPACE bytes.
Ties go to the lower column. Deterministic. NaN counts as +inf; entries of +inf are not listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.packing import Packed, largest_of_rows, pack, part_of
from fastmatch_kernels._triton.product import (
    check_dtypes,
    factor_arguments,
    output_tile,
    plan_product,
    reduced_cost_tile,
)
from fastmatch_kernels._triton.tiles import ROUNDOFF, Tiles, ceil_div, precision_of
from fastmatch_kernels.row_topk.reference import RowArguments, term_sizes

__all__ = ["few_of", "product_error", "row_min", "row_topk", "select", "write_least"]

WORKSPACE = 1 << 28
"""Bytes for candidates."""

MAX_CANDIDATES = 1 << 13
"""Candidates of a row that one program of the selection holds."""


NOTHING = tl.constexpr(0x7F800000_7FFFFFFF)
"""The key of +inf in the last column."""


@triton.jit
def _ordered(value):
    """float32 as int32 of the same order; both zeros are one."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(key):
    """The float32 of an int32 that :func:`_ordered` made, its last bits gone or not."""
    value = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return tl.where(value == value, value, -float("inf"))  # -inf less its last bits is no number


@triton.jit
def write_least(value, few, first_column, at, in_row, value_ptr, column_ptr, BLOCK_N: tl.constexpr):
    """Write the ``few`` least values of each row of a tile, with their columns; return the least one left."""
    for pick in range(few):
        best, where = tl.min(value, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(value_ptr + at * few + pick, best, mask=in_row)
        tl.store(column_ptr + at * few + pick, first_column + where, mask=in_row)
        value = tl.where(tl.arange(0, BLOCK_N)[None, :] == where[:, None], float("inf"), value)
    return tl.min(value, 1)


@triton.jit
def _candidates_kernel(
    factors,
    v_ptr,  # (m,) float32
    value_ptr,  # (n, tiles_n, few) float32
    column_ptr,  # (n, tiles_n, few) int32
    cutoff_ptr,  # (n, tiles_n) float32
    n,
    m,
    few,
    EXACT: tl.constexpr,
    # These five are written out in every kernel of this kind: Triton takes compile-time constants only as parameters.
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_n, row, column = output_tile(n, m, GROUP, BLOCK_M, BLOCK_N)
    value = reduced_cost_tile(factors, v_ptr, row, column, n, m, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    at = row.to(tl.int64) * tiles_n + tile_n
    if EXACT:
        cutoff = write_least(value, few, tile_n * BLOCK_N, at, row < n, value_ptr, column_ptr, BLOCK_N)
    else:
        # A value's last bits give way to its column: one minimum finds both, at a third of the operations. So a value is
        # lower by 2^-15 of itself at most, which the bound includes.
        key = (_ordered(value) & -BLOCK_N) | tl.arange(0, BLOCK_N)[None, :]
        for pick in range(few):
            best = tl.min(key, 1)
            tl.store(value_ptr + at * few + pick, _unordered(best & -BLOCK_N), mask=row < n)
            tl.store(column_ptr + at * few + pick, tile_n * BLOCK_N + (best & (BLOCK_N - 1)), mask=row < n)
            key = tl.where(key == best[:, None], 0x7F800000 | (BLOCK_N - 1), key)  # +inf
        cutoff = _unordered(tl.min(key, 1) & -BLOCK_N)
    tl.store(cutoff_ptr + at, cutoff, mask=row < n)


@triton.jit
def _select_kernel(
    value_ptr,  # (n, candidates) float32
    column_ptr,  # (n, candidates) int32
    cutoff_ptr,  # (n, tiles_n) float32
    v_ptr,  # (m,) float32
    index_ptr,  # (n, k) int64
    best_ptr,  # (n, k) float32, values c - v
    cost_ptr,  # (n, k) float32
    bound_ptr,  # (n,) float32
    n,
    k,
    candidates,
    tiles_n,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_row = row < n
    slot = tl.arange(0, BLOCK_C)
    at = row[:, None] * candidates + slot[None, :]
    mask = in_row[:, None] & (slot < candidates)[None, :]
    value = tl.load(value_ptr + at, mask=mask, other=float("inf"))
    column = tl.load(column_ptr + at, mask=mask, other=0x7FFFFFFF)
    # One number of a value and its column: a minimum finds both, and ties go to the lower column.
    key = (_ordered(value).to(tl.int64) << 32) | column.to(tl.int64)
    for pick in range(k):
        least = tl.min(key, 1)
        best = _unordered((least >> 32).to(tl.int32))
        column_of = (least & 0x7FFFFFFF).to(tl.int32)
        listed = in_row & (best < float("inf"))
        v = tl.load(v_ptr + column_of, mask=listed, other=0.0)
        out = row * k + pick
        tl.store(index_ptr + out, tl.where(listed, column_of, -1).to(tl.int64), mask=in_row)
        tl.store(best_ptr + out, best, mask=in_row)
        tl.store(cost_ptr + out, best + v, mask=in_row)
        key = tl.where(key == least[:, None], NOTHING, key)
    bound = _unordered((tl.min(key, 1) >> 32).to(tl.int32))
    tile = tl.arange(0, BLOCK_T)
    cutoff = tl.load(
        cutoff_ptr + row[:, None] * tiles_n + tile[None, :],
        mask=in_row[:, None] & (tile < tiles_n)[None, :],
        other=float("inf"),
    )
    tl.store(bound_ptr + row, tl.minimum(bound, tl.min(cutoff, 1)), mask=in_row)


def few_of(k: int, tiles_n: int) -> int:
    """Return how many candidates a tile writes per row.

    Of k columns in any order, a tile holds more with a probability of at most ``binomial(k, few + 1) / tiles_n^few``: 1%.
    """
    few = min(k, ceil_div(k, tiles_n) + 1)
    while few < k and 100 * math.comb(k, few + 1) > tiles_n**few:
        few += 1
    return few


def product_error(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    precision: str,
    contraction_index: Sequence[torch.Tensor | None] | None = None,
    sizes: torch.Tensor | None = None,
    peaks: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n,) float64: a bound on the rounding error of every computed ``c_ij - v_j`` of row i; inf where a sum may overflow.

    ``(relative error of a product + gamma_terms) sum_k |a_ik| max_j |b_jk|`` by Cauchy and Schwarz, what numbers near
    zero lose beside the largest of their rows, and the rounding of v to float32 and of the subtraction. In scaled precisions
    it is inf too beside elements that are not finite. Reads each factor once or twice, unless ``sizes`` (what
    :func:`term_sizes` returns) and ``peaks`` (at least ``max_k |a_ik| max_jk |b_jk|``) are given.
    """
    key = precision_of(factors[0][0].dtype, precision)
    relative, floor, passes = ROUNDOFF[key]
    depth = sum(a.shape[1] for a, _ in factors)
    terms = passes * depth + 4
    # Matrix units may cut off where they add, which costs twice the unit roundoff.
    relative += terms * 2.0**-23 / (1 - terms * 2.0**-23)
    scale = term_sizes(factors, contraction_index) if sizes is None else sizes
    # On the device: nothing waits for it.
    top = torch.where(v.isfinite(), v.abs(), 0.0).double().amax() if len(v) else 0.0
    # Terms below the smallest normal number may be flushed to zero.
    tiny = 4 * terms * 2.0**-126
    # Values of "fp16" lose up to 8 of their 23 bits to the column that they carry.
    carried = 2.0**-14 if key == "fp16" else 2.0**-22
    error = relative * scale * (1 + 2.0**-20) + carried * (scale + top) + tiny
    if floor:
        if peaks is None:
            peaks = peaks_of(*(largest_of_rows([pair[side] for pair in factors]) for side in (0, 1)))
        error = error + floor * depth * peaks
        error = torch.where(peaks.isfinite(), error, torch.inf)
    return torch.where(scale + top < 2.0**126, error, torch.inf)


def peak(scale: torch.Tensor) -> torch.Tensor:
    """At least the largest element of rows that were packed with these scales; inf where it is not finite."""
    return torch.where(scale < 2.0**127, 2.0 * scale, torch.inf)


def peaks_of(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(n,) float64: each row's largest element times the largest one of the other side."""
    return left.double() * (right.double().amax() if len(right) else 0.0)


def select_tiles(candidates: int, *, interpreted: bool = False) -> Tiles:
    """(rows, candidates) of one program of the selection: one row, and a warp for every 1024 candidates.

    The interpreter takes its time by programs, so there each has many rows.
    """
    columns = triton.next_power_of_2(max(candidates, 2))
    return Tiles(16 if interpreted else 1, columns, 1, max(columns // 1024, 1), 1)


def select(
    candidates: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    v: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    few: int,
) -> None:
    """Select each row's least candidates.

    Args:
        candidates: (rows, tiles, few) values and columns, (rows, tiles) cut-offs.
        v: (m,) float32 column duals.
        out: written: (n, k) columns, values, costs, and (n,) the least value outside; n of the rows are used.
        few: candidates of a tile.
    """
    (n, k), tiles_n = out[0].shape, candidates[2].shape[1]
    tiles = select_tiles(tiles_n * few, interpreted=v.device.type == "cpu")
    _select_kernel[(ceil_div(n, tiles.rows),)](
        *candidates,
        v,
        *out,
        n,
        k,
        tiles_n * few,
        tiles_n,
        BLOCK_R=tiles.rows,
        BLOCK_C=tiles.columns,
        BLOCK_T=triton.next_power_of_2(max(tiles_n, 2)),
        **tiles.options,
    )


def most_columns(k: int, tile: int) -> int:
    """How many columns one selection holds the candidates of, for tiles of ``tile`` columns."""
    # The more tiles there are, the fewer candidates each hands out: double the tiles while they fit.
    tiles_n = 1
    while few_of(k, 2 * tiles_n) * 2 * tiles_n <= MAX_CANDIDATES:
        tiles_n *= 2
    return tiles_n * tile


def _reduce(
    arguments: RowArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (indices, values, costs, smallest computed value outside, peaks of the packed factors or None) of every row.

    Columns beyond what one selection holds are reduced part by part, and the parts' lists are merged.
    """
    a, b, v, k = arguments.a, arguments.b, arguments.v, arguments.k
    n, m = len(a[0]), len(v)
    check_dtypes(a, b)
    key, tiles, constants = plan_product((n, m), a[0].dtype, arguments.precision, v.device, "reduced")
    if n == 0 or m == 0 or k == 0:
        return *_no_lists(n, k, v.device), None
    left, right = pack(a, key), pack(b, key, arguments.b_index, arguments.contraction_index)
    constants["EXACT"] = key != "fp16"
    peaks = (
        None if left.scale is None or right.scale is None else peaks_of(peak(left.scale), peak(right.scale))
    )
    v32 = v.float().contiguous()
    most = most_columns(min(k, m), tiles.columns)
    if m <= most:
        out = _no_lists(n, k, v.device)
        _reduce_part(left, right, v32, out, tiles, constants)
        return *out, peaks
    found = []
    for lo in range(0, m, most):
        part = slice(lo, min(lo + most, m))
        out = _no_lists(n, k, v.device)
        _reduce_part(left, part_of(right, part), v32[part], out, tiles, constants)
        found.append((torch.where(out[0] < 0, out[0], out[0] + lo), *out[1:]))
    index, best, cost = (torch.cat([part[i] for part in found], 1) for i in range(3))
    # Stable, so that ties go to the lower column here too.
    best, order = best.sort(dim=1, stable=True)
    outside = torch.stack([part[3] for part in found]).amin(0)
    outside = torch.minimum(outside, best[:, k])
    order = order[:, :k]
    return index.gather(1, order), best[:, :k].contiguous(), cost.gather(1, order), outside, peaks


def _no_lists(
    n: int, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices, values, costs, smallest value outside) of lists without entries."""
    best, cost = (torch.full((n, k), torch.inf, device=device) for _ in range(2))
    index = torch.full((n, k), -1, dtype=torch.int64, device=device)
    return index, best, cost, torch.full((n,), torch.inf, device=device)


def _reduce_part(
    left: Packed,
    right: Packed,
    v: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tiles: Tiles,
    constants: dict[str, Any],
) -> None:
    """Write what :func:`_reduce` returns of at most as many columns as one selection holds."""
    (n, k), m = out[0].shape, len(v)
    tiles_n = ceil_div(m, tiles.columns)
    few = min(k, tiles.columns) if 2 * k > m else few_of(k, tiles_n)
    if tiles_n * few > MAX_CANDIDATES:
        raise ValueError(f"k: expected at most {MAX_CANDIDATES} entries per row, got {k}")
    step = max(WORKSPACE // (tiles_n * (8 * few + 4)) // tiles.rows, 1) * tiles.rows
    rows = min(step, n)
    value = torch.empty(rows, tiles_n, few, device=v.device)
    column = torch.empty(rows, tiles_n, few, dtype=torch.int32, device=v.device)
    cutoff = torch.empty(rows, tiles_n, device=v.device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        count = part.stop - start
        _candidates_kernel[(ceil_div(count, tiles.rows) * tiles_n,)](
            factor_arguments(part_of(left, part), right), v, value, column, cutoff, count, m, few, **constants
        )
        index, best, cost, outside = (x[part] for x in out)
        select((value, column, cutoff), v, (index, best, cost, outside), few)


def row_topk(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce tile by tile in float32; ``v`` is finite or -inf, and ``tile`` is not used."""
    index, _, cost, outside, peaks = _reduce(arguments)
    v = arguments.v
    if cost.numel() == 0 and outside.numel() and len(v):
        outside = torch.full_like(outside, -float("inf"))  # k = 0: everything is outside
    error = product_error(
        arguments.pairs, v, arguments.precision, arguments.contraction_index, arguments.sizes, peaks
    )
    bound = (outside.double() - error).float()
    below = bound.nextafter(torch.full_like(bound, -float("inf")))
    below = torch.where(outside.isfinite(), below, outside)
    return index, cost, torch.where(error.isfinite(), below, -float("inf"))


def row_min(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """List one entry per row; its value differs from the true minimum by at most :func:`product_error`."""
    index, best, *_ = _reduce(arguments)
    return best[:, 0], index[:, 0]
