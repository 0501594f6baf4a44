# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
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

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.product import factor_arguments, output_tile, plan_product, reduced_cost_tile
from fastmatch_kernels._triton.tiles import ROUNDOFF, Tiles, ceil_div, precision_of
from fastmatch_kernels.row_topk.reference import RowArguments, term_sizes

__all__ = ["few_of", "product_error", "row_min", "row_topk", "select"]

WORKSPACE = 1 << 28
"""Bytes for candidates."""

MAX_CANDIDATES = 1 << 14
"""Candidates of a row that one program of the selection holds."""


@triton.jit
def _candidates_kernel(
    factors,
    b_index_ptr,  # (m,) int64, or None
    v_ptr,  # (m,) float32
    value_ptr,  # (n, tiles_n, few) float32
    column_ptr,  # (n, tiles_n, few) int32
    cutoff_ptr,  # (n, tiles_n) float32
    n,
    m,
    few,
    # These six are written out in every kernel of this kind: Triton takes compile-time constants only as parameters.
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_n, row, column = output_tile(n, m, GROUP, BLOCK_M, BLOCK_N)
    value = reduced_cost_tile(
        factors, b_index_ptr, v_ptr, row, column, n, m, K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    at = row.to(tl.int64) * tiles_n + tile_n
    for pick in range(few):
        best, where = tl.min(value, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(value_ptr + at * few + pick, best, mask=row < n)
        tl.store(column_ptr + at * few + pick, tile_n * BLOCK_N + where, mask=row < n)
        value = tl.where(tl.arange(0, BLOCK_N)[None, :] == where[:, None], float("inf"), value)
    tl.store(cutoff_ptr + at, tl.min(value, 1), mask=row < n)


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
    value = tl.load(value_ptr + at, mask=in_row[:, None] & (slot < candidates)[None, :], other=float("inf"))
    for pick in range(k):
        best, where = tl.min(value, 1, return_indices=True, return_indices_tie_break_left=True)
        listed = in_row & (best < float("inf"))
        column = tl.load(column_ptr + row * candidates + where, mask=listed, other=-1)
        v = tl.load(v_ptr + column, mask=listed, other=0.0)
        tl.store(index_ptr + row * k + pick, column.to(tl.int64), mask=in_row)
        tl.store(best_ptr + row * k + pick, best, mask=in_row)
        tl.store(cost_ptr + row * k + pick, best + v, mask=in_row)
        value = tl.where(slot[None, :] == where[:, None], float("inf"), value)
    bound = tl.min(value, 1)
    tile = tl.arange(0, BLOCK_T)
    cutoff = tl.load(
        cutoff_ptr + row[:, None] * tiles_n + tile[None, :],
        mask=in_row[:, None] & (tile < tiles_n)[None, :],
        other=float("inf"),
    )
    tl.store(bound_ptr + row, tl.minimum(bound, tl.min(cutoff, 1)), mask=in_row)


def few_of(k: int, tiles_n: int) -> int:
    """Number of candidates that a tile writes per row: twice its share of the k, plus two."""
    return min(k, 2 * ceil_div(k, tiles_n) + 2)


def product_error(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    precision: str,
    contraction_index: Sequence[torch.Tensor | None] | None = None,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """(n,) float64: a bound on the rounding error of every computed ``c_ij - v_j`` of row i.

    ``(relative error of a product + gamma_terms) sum_k |a_ik| max_j |b_jk|`` by Cauchy and Schwarz, and the
    rounding of v to float32 and of the subtraction. Reads each factor once, unless ``sizes`` (what
    :func:`term_sizes` returns) is given.
    """
    key = precision_of(factors[0][0].dtype, precision)
    relative, passes = ROUNDOFF[key]
    terms = passes * sum(a.shape[1] for a, _ in factors) + 4
    # Matrix units may cut off where they add, which costs twice the unit roundoff.
    relative += terms * 2.0**-23 / (1 - terms * 2.0**-23)
    scale = term_sizes(factors, contraction_index) if sizes is None else sizes
    finite = v[v.isfinite()].abs().double()
    largest = float(finite.max()) if finite.numel() else 0.0
    # Terms below the smallest normal number may be flushed to zero.
    tiny = 4 * terms * 2.0**-126
    return relative * scale * (1 + 2.0**-20) + 2.0**-22 * (scale + largest) + tiny


def select_tiles(candidates: int) -> Tiles:
    """(rows, candidates) of one program of the selection: about 4096 values."""
    columns = triton.next_power_of_2(max(candidates, 2))
    return Tiles(max(min(4096 // columns, 16), 1), columns, 1, 4 if columns <= 4096 else 8, 1)


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
    tiles = select_tiles(tiles_n * few)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (indices, values, costs, smallest computed value outside) of every row.

    Columns beyond what one selection holds are reduced part by part, and the parts' lists are merged.
    """
    m, k = len(arguments.v), arguments.k
    tiles, _ = plan_product(arguments.a, arguments.b, m, arguments.precision)
    if k == 0 or m == 0:
        return _reduce_part(arguments)
    most = most_columns(min(k, m), tiles.columns)
    if m <= most:
        return _reduce_part(arguments)
    found = []
    for lo in range(0, m, most):
        part = slice(lo, min(lo + most, m))
        rows = arguments.b_index
        given = arguments._replace(
            b=arguments.b if rows is not None else [x[part] for x in arguments.b],
            b_index=None if rows is None else rows[part],
            v=arguments.v[part],
        )
        index, best, cost, outside = _reduce_part(given)
        found.append((torch.where(index < 0, index, index + lo), best, cost, outside))
    index, best, cost = (torch.cat([part[i] for part in found], 1) for i in range(3))
    # Stable, so that ties go to the lower column here too.
    best, order = best.sort(dim=1, stable=True)
    outside = torch.stack([part[3] for part in found]).amin(0)
    outside = torch.minimum(outside, best[:, k])
    order = order[:, :k]
    return index.gather(1, order), best[:, :k].contiguous(), cost.gather(1, order), outside


def _reduce_part(
    arguments: RowArguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`_reduce` returns, of at most as many columns as one selection holds."""
    a, b, v, k = arguments.a, arguments.b, arguments.v, arguments.k
    n, m, device = len(a[0]), len(v), v.device
    tiles, constants = plan_product(a, b, m, arguments.precision)
    index = torch.full((n, k), -1, dtype=torch.int64, device=device)
    best, cost = (torch.full((n, k), float("inf"), device=device) for _ in range(2))
    outside = torch.full((n,), float("inf"), device=device)
    if n == 0 or m == 0 or k == 0:
        return index, best, cost, outside
    v32 = v.float().contiguous()
    tiles_n = ceil_div(m, tiles.columns)
    few = few_of(min(k, m), tiles_n)
    candidates = tiles_n * few
    if candidates > MAX_CANDIDATES:
        raise ValueError(f"k: expected at most {MAX_CANDIDATES} entries per row, got {k}")
    step = max(WORKSPACE // (tiles_n * (8 * few + 4)) // tiles.rows, 1) * tiles.rows
    rows = min(step, n)
    value = torch.empty(rows, tiles_n, few, device=device)
    column = torch.empty(rows, tiles_n, few, dtype=torch.int32, device=device)
    cutoff = torch.empty(rows, tiles_n, device=device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        count = part.stop - start
        _candidates_kernel[(ceil_div(count, tiles.rows) * tiles_n,)](
            factor_arguments([x[part] for x in a], b, arguments.contraction_index),
            arguments.b_index,
            v32,
            value,
            column,
            cutoff,
            count,
            m,
            few,
            **constants,
        )
        select((value, column, cutoff), v32, (index[part], best[part], cost[part], outside[part]), few)
    return index, best, cost, outside


def row_topk(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce tile by tile in float32; ``v`` is finite or -inf, and ``tile`` is not used."""
    index, _, cost, outside = _reduce(arguments)
    v = arguments.v
    if cost.numel() == 0 and outside.numel() and len(v):
        outside = torch.full_like(outside, -float("inf"))  # k = 0: everything is outside
    error = product_error(
        arguments.pairs, v, arguments.precision, arguments.contraction_index, arguments.sizes
    )
    bound = (outside.double() - error).float()
    below = bound.nextafter(torch.full_like(bound, -float("inf")))
    return index, cost, torch.where(bound.isfinite(), below, outside)


def row_min(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """List one entry per row; its value differs from the true minimum by at most :func:`product_error`."""
    index, best, _, _ = _reduce(arguments)
    return best[:, 0], index[:, 0]
