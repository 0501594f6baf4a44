# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launches pass plain values for tl.constexpr parameters; tl.static_range is only known to the compiler.
"""Row reductions of ``c_ij - v_j`` for ``c = -(sum_k A_k B_k^T)``: shortlists with a bound, and row minima.

The cost matrix is never stored. Each tile of it is formed in registers and hands out, per row, its ``few``
smallest values with their columns and its cut-off, the smallest value it kept back. A second kernel selects
k of a row's candidates; the bound is the least of the cut-offs and of the candidates not selected, so it is
exactly the smallest computed value outside the list. What is returned as bound is that, less the rounding
error of the computation (:func:`product_error`), so it is never above a true value outside the list.

If one tile holds more than ``few`` of a row's k smallest, those beyond are outside the list and the bound says
so: the entries not above the bound are always the row's smallest, in order.

Operations: ``2 n m d`` for the products and about ``4 few n m`` for the picking. Bytes: the factors as in a
GEMM, ``8 few + 4`` bytes per row and tile of columns, taken in chunks of rows within WORKSPACE bytes.
Ties go to the lower column. Deterministic. NaN counts as +inf; entries of +inf are not listed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastmatch_kernels._triton.product import product_tile
from fastmatch_kernels._triton.tiles import (
    ROUNDOFF,
    Tiles,
    ceil_div,
    dot_precision,
    factors_aligned,
    matmul_tiles,
    precision_of,
    target_of,
)
from fastmatch_kernels.gain.triton import check_dtypes, grouped_tile
from fastmatch_kernels.row_topk.reference import term_sizes

__all__ = ["few_of", "product_error", "row_min", "row_topk"]

GROUP = 8
WORKSPACE = 1 << 28
"""Bytes for candidates."""
MAX_CANDIDATES = 1 << 14
"""Candidates of a row that one program of the selection holds."""


@triton.jit
def _candidates_kernel(
    a_ptrs,  # K x (n, d)
    b_ptrs,  # K x (m, d)
    depths,
    a_strides,
    b_strides,
    contraction_ptrs,  # K x (d,) int64, or None
    b_index_ptr,  # (m,) int64, or None
    v_ptr,  # (m,) float32
    value_ptr,  # (n, tiles_n, few) float32
    column_ptr,  # (n, tiles_n, few) int32
    cutoff_ptr,  # (n, tiles_n) float32
    n,
    m,
    few,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(m, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.cdiv(n, BLOCK_M), tiles_n, GROUP)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if b_index_ptr is None:
        b_row = column
    else:
        b_row = tl.load(b_index_ptr + column, mask=column < m, other=0)
    gain = product_tile(
        a_ptrs,
        b_ptrs,
        depths,
        a_strides,
        b_strides,
        contraction_ptrs,
        row,
        row < n,
        b_row,
        column < m,
        K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    v = tl.load(v_ptr + column, mask=column < m, other=0.0)
    value = -gain - v[None, :]
    value = tl.where((column < m)[None, :] & (value == value), value, float("inf"))
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
    """Candidates a tile hands out per row: twice its share of the k, and two."""
    return min(k, 2 * ceil_div(k, tiles_n) + 2)


def product_error(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    precision: str,
    contraction_index: list[torch.Tensor | None] | None = None,
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


def _reduce(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    k: int,
    b_index: torch.Tensor | None,
    contraction_index: list[torch.Tensor | None] | None,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices, values, costs, smallest computed value outside) of every row."""
    a = [pair[0] for pair in factors]
    b = [pair[1] for pair in factors]
    check_dtypes(a, b)
    device = a[0].device
    target = target_of(device)
    n, m = a[0].shape[0], len(v)
    index = torch.full((n, k), -1, dtype=torch.int64, device=device)
    best, cost = (torch.full((n, k), float("inf"), device=device) for _ in range(2))
    outside = torch.full((n,), float("inf"), device=device)
    if n == 0 or m == 0 or k == 0:
        return index, best, cost, outside
    v32 = v.float().contiguous()
    key = precision_of(a[0].dtype, precision)
    tiles = matmul_tiles(n, m, key, target, aligned=factors_aligned(*a, *b))
    tiles_n = ceil_div(m, tiles.columns)
    few = few_of(min(k, m), tiles_n)
    candidates = tiles_n * few
    if candidates > MAX_CANDIDATES:
        limit = MAX_CANDIDATES // few * tiles.columns
        raise ValueError(f"v: expected at most {limit} columns for k = {k}, got {m}")
    select = select_tiles(candidates)
    step = max(WORKSPACE // (tiles_n * (8 * few + 4)) // tiles.rows, 1) * tiles.rows
    rows = min(step, n)
    value = torch.empty(rows, tiles_n, few, device=device)
    column = torch.empty(rows, tiles_n, few, dtype=torch.int32, device=device)
    cutoff = torch.empty(rows, tiles_n, device=device)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        count = part.stop - start
        _candidates_kernel[(ceil_div(count, tiles.rows) * tiles_n,)](
            tuple(x[part] for x in a),
            tuple(b),
            tuple(x.shape[1] for x in a),
            tuple(x.stride() for x in a),
            tuple(x.stride() for x in b),
            tuple(contraction_index or [None] * len(a)),
            b_index,
            v32,
            value,
            column,
            cutoff,
            count,
            m,
            few,
            K=len(a),
            PRECISION=dot_precision(key, target),
            GROUP=GROUP,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            **tiles.options,
        )
        _select_kernel[(ceil_div(count, select.rows),)](
            value,
            column,
            cutoff,
            v32,
            index[part],
            best[part],
            cost[part],
            outside[part],
            count,
            k,
            candidates,
            tiles_n,
            BLOCK_R=select.rows,
            BLOCK_C=select.columns,
            BLOCK_T=triton.next_power_of_2(max(tiles_n, 2)),
            **select.options,
        )
    return index, best, cost, outside


def row_topk(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    k: int,
    *,
    b_index: torch.Tensor | None = None,
    contraction_index: list[torch.Tensor | None] | None = None,
    precision: str = "ieee",
    sizes: torch.Tensor | None = None,
    tile: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row k columns of smallest ``c_ij - v_j``, and a lower bound on ``c_ij - v_j`` outside the list.

    Args:
        factors: pairs (n, d), (m, d) of one dtype: ``c = -sum A B[b_index][:, contraction_index]^T``.
        v: (m,) finite, or -inf for a column that is not to be listed.
        k: how many.
        b_index: (m,) int64, or None.
        contraction_index: per pair (d,) int64, or None.
        precision: "ieee", "tf32", "bf16x3"; half-precision factors are multiplied as they are.
        sizes: (n,) float64, what :func:`term_sizes` returns, if it is known.
        tile: of the CPU's; tiles here are picked by :func:`matmul_tiles`.

    Returns:
        (indices (n, k) int64, costs c (n, k) float32, bound (n,) float32), by rising ``c - v``; where a row
        has fewer than k entries, -1 and +inf. The bound is +inf where nothing is outside.
    """
    index, _, cost, outside = _reduce(factors, v, k, b_index, contraction_index, precision)
    if cost.numel() == 0 and outside.numel() and len(v):
        outside = torch.full_like(outside, -float("inf"))  # k = 0: everything is outside
    error = product_error(factors, v, precision, contraction_index, sizes)
    bound = (outside.double() - error).float()
    return (
        index,
        cost,
        torch.where(bound.isfinite(), bound.nextafter(bound.new_tensor(-float("inf"))), outside),
    )


def row_min(
    factors: list[tuple[torch.Tensor, torch.Tensor]],
    v: torch.Tensor,
    *,
    b_index: torch.Tensor | None = None,
    contraction_index: list[torch.Tensor | None] | None = None,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row the smallest ``c_ij - v_j`` as computed (n,) float32, and its column (n,) int64.

    It differs from the true minimum by at most :func:`product_error`. +inf and -1 for a row without entries.
    """
    index, best, _, _ = _reduce(factors, v, 1, b_index, contraction_index, precision)
    return best[:, 0], index[:, 0]
