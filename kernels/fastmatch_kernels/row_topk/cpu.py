"""Row reductions of ``c_ij - v_j`` for costs given by factors, on CPU: BLAS tiles, then a running top-k.

Tiles of c come from the caller's BLAS in the factors' own precision; these kernels keep, per row, the k smallest ``c - v``
with their columns, and afterwards compute the costs of what was kept again, in float64 from the factors. So
what the solver sees is exact to float64; the tiles' rounding only lowers the bound on what was not kept.

Precision "bf16" is for processors with bfloat16 matrix units: products of rounded factors, each raised by a bound on
what the rounding of its own two rows may have taken from it. So every ``c - v`` computed is at most the true one.

Work on a tile: one compare an entry, a vector of them at a time; an insertion only where one hits, about
k log(m / k) times a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numba import types
from numba.extending import overload

from fastmatch_kernels._factors import result_dtype
from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.gain.reference import gathered
from fastmatch_kernels.matrix_product import addmm_nt
from fastmatch_kernels.row_topk.reference import RowArguments, product_error, term_sizes

__all__ = [
    "DISTANCES",
    "TILE",
    "each_tile",
    "merge_tile",
    "products",
    "rescore",
    "round_rows",
    "row_min",
    "row_topk",
    "screened_topk",
    "screening_pair",
    "smallest",
    "upper_products",
]

TILE = (1024, 8192)
"""Rows and columns of a tile: 32 MB in float32, large enough for BLAS on all cores."""

CHUNK = 64
DISTANCES = {"dot": 0, "l2": 1, "l1": 2}

BALANCE = 16.0
"""Power of two that keeps the columns of norms in a screening pair small compared with the factors: see :func:`screening_pair`."""


def cost_of(x):
    """The cost of a tile's entry: a float is the cost itself; bits of a bfloat16 inner product give a lower bound on it."""
    raise NotImplementedError("compiled code only")


@overload(cost_of, inline="always")
def _cost_of(x):
    if isinstance(x, types.Float):
        return lambda x: x

    def lowest(x):  # pragma: no cover - compiled
        # The inner product was rounded to nearest: it is off by at most 2^-8 of itself. Exact in float32.
        inner = np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
        return -inner - np.float32(2.0**-8) * abs(inner)

    return lowest


@njit(nogil=True)
def merge_tile(tile, v, lo, hi, first, values, items):  # pragma: no cover - compiled
    """Merges rows lo..hi of ``tile - v``, whose columns are first, first + 1, ..., into sorted lists.

    ``values`` and ``items`` are (rows, k): the k smallest seen so far, rising; inf and -1 where fewer. NaN never enters.
    A tile of uint16 holds the bits of bfloat16 inner products: see :func:`cost_of`.
    """
    width, chunk, one = np.uintp(tile.shape[1]), np.uintp(CHUNK), np.uintp(1)
    last = np.uintp(values.shape[1] - 1)
    for i in range(lo, hi):
        x, best, item = tile[i], values[i], items[i]
        worst = best[last]
        at = np.uintp(0)
        while at < width:
            stop = min(at + chunk, width)
            if stop - at == chunk:
                hits = 0
                for lane in range(CHUNK):
                    hits += cost_of(x[at + np.uintp(lane)]) - v[at + np.uintp(lane)] < worst
                if hits == 0:
                    at = stop
                    continue
            while at < stop:
                y = cost_of(x[at]) - v[at]
                if y < worst:
                    e = last
                    while e > 0 and best[e - one] > y:
                        best[e] = best[e - one]
                        item[e] = item[e - one]
                        e -= one
                    best[e] = y
                    item[e] = first + np.int64(at)
                    worst = best[last]
                at += one
            at = stop


@njit(nogil=True, fastmath={"reassoc", "contract"})
def rescore(A, B, rows, items, lo, hi, metric, scale, out):  # pragma: no cover - compiled
    """out[r, e] += scale * (a . b, |a - b|^2 or |a - b|_1) in float64 for a = A[rows[r]], b = B[items[r, e]].

    Entries with item -1 are set to inf.
    """
    for r in range(lo, hi):
        a = A[rows[r]]
        for e in range(items.shape[1]):
            if items[r, e] < 0:
                out[r, e] = np.inf
                continue
            b = B[items[r, e]]
            total = 0.0
            if metric == 0:
                for q in range(a.shape[0]):
                    total += np.float64(a[q]) * np.float64(b[q])
            elif metric == 1:
                for q in range(a.shape[0]):
                    difference = np.float64(a[q]) - np.float64(b[q])
                    total += difference * difference
            else:
                for q in range(a.shape[0]):
                    total += abs(np.float64(a[q]) - np.float64(b[q]))
            out[r, e] += scale * total


def each_tile(
    shape: tuple[int, int],
    tile: Sequence[int],
    dtype: torch.dtype,
    fill: Callable[[slice, slice, torch.Tensor], None],
    take: Callable[[np.ndarray, int, int, int, int], None],
    work: float,
) -> None:
    """Forms a matrix tile by tile: ``fill(rows, columns, out)`` writes one, ``take(tile, top, first, lo, hi)`` reads its
    rows lo..hi, on several cores; its first row and column are ``top`` and ``first``. ``work``: of an entry, for the split.
    """
    n, m = shape
    height, width = tile
    # One buffer for all tiles: fresh pages would cost as much as the product.
    room = torch.empty(min(height, n) * min(width, m), dtype=dtype, device="cpu")
    for top in range(0, n, height):
        rows = slice(top, min(top + height, n))
        count = rows.stop - top
        for first in range(0, m, width):
            columns = slice(first, min(first + width, m))
            out = room[: count * (columns.stop - first)].view(count, columns.stop - first)
            fill(rows, columns, out)
            over_rows(count, int(out.numel() * work), partial(take, out.numpy(), top, first))


def smallest(
    n: int,
    v: torch.Tensor,
    kept: int,
    tile: Sequence[int],
    fill: Callable[[slice, slice, torch.Tensor], None],
    stored: torch.dtype | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``kept`` smallest of ``c - v`` of n rows and their columns, rising; inf and -1 where there are fewer.

    ``fill(rows, columns, out)`` writes one tile of c, in v's dtype or as ``stored``: see :func:`merge_tile`.
    """
    values = torch.full((n, kept), torch.inf, dtype=v.dtype, device="cpu").numpy()
    items = np.full((n, kept), -1, np.int32)
    duals = v.numpy()

    def take(entries: np.ndarray, top: int, first: int, lo: int, hi: int) -> None:
        rows = slice(top, top + len(entries))
        merge_tile(entries, duals[first:], lo, hi, first, values[rows], items[rows])

    # Most of a tile is passed over by one comparison of vectors.
    each_tile((n, len(v)), tile, stored or v.dtype, fill, take, 1 / 8)
    return values, items


def products(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    b_index: torch.Tensor | None = None,
    contraction_index: Sequence[torch.Tensor | None] | None = None,
) -> Callable[[slice, slice, torch.Tensor], None]:
    """What writes a tile of ``c = -sum_k A_k B_k^T`` in the tile's dtype."""
    contractions = contraction_index or [None] * len(factors)

    def fill(rows: slice, columns: slice, out: torch.Tensor) -> None:
        for k, ((a, b), inner) in enumerate(zip(factors, contractions, strict=True)):
            if b_index is None:
                right = gathered(b[columns], None, inner)
            else:
                right = gathered(b, b_index[columns], inner)
            # The first product overwrites: filling the tile beforehand would be another pass over it.
            addmm_nt(out, a[rows].to(out.dtype), right.to(out.dtype), beta=int(k > 0), alpha=-1)

    return fill


def screening_pair(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 (n, e), (m, e), e the factors' depths and 2 for each: inner products are never below the true sum.

    With a' the rounded a, ``a.b - a'.b' = (a - a').b + a'.(b - b')``, by Cauchy and Schwarz at most
    ``|a - a'| |b| + |a'| |b - b'|``: two more terms of the inner product. Their four norms are in float64 and rounded
    upwards. What is left is the rounding of float32 sums of these terms and of the result.
    """
    left, right = [], []
    for a, b in factors:
        (near_a, _, kept_a, lost_a), (near_b, whole_b, _, lost_b) = _rounded(a), _rounded(b)
        # |a - a'| is some 2^-9 of |a|: with both scaled the other way, no column adds much to a row's norm.
        left += [near_a, _above(BALANCE * lost_a), _above(kept_a / BALANCE)]
        right += [near_b, _above(whole_b / BALANCE), _above(BALANCE * lost_b)]
    return torch.cat(left, 1), torch.cat(right, 1)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n, d) in bfloat16, and (n,) float64 norms of its rows, of the rounded ones, and of the difference.

    Rows that are not finite count as 0, as in ``term_sizes``.
    """
    x = x.float().contiguous()
    near, squares = (
        torch.empty(x.shape, dtype=torch.uint16, device="cpu"),
        torch.empty(3, len(x), dtype=torch.float64, device="cpu"),
    )
    over_rows(len(x), x.numel(), partial(round_rows, x.numpy(), near.numpy(), squares.numpy()))
    whole, kept, lost = squares.sqrt().nan_to_num(0, 0, 0)
    return near.view(torch.bfloat16), whole, kept, lost


@njit(nogil=True, fastmath={"reassoc", "contract"})
def round_rows(x, near, squares, lo, hi):  # pragma: no cover - compiled
    """near[i] = bits of the float32 x[i] rounded to bfloat16; squares[:, i] = |x_i|^2, |near_i|^2, |x_i - near_i|^2.

    Subnormal numbers become zero, as matrix units treat them, and the difference counts in the third norm. Finite
    numbers stay finite.
    """
    infinity, largest, normal = np.uint32(0x7F800000), np.uint32(0x7F7F0000), np.uint32(0x00800000)
    for i in range(lo, hi):
        row, bits, out = x[i], x[i].view(np.uint32), near[i]
        whole, kept, lost = 0.0, 0.0, 0.0
        for q in range(row.shape[0]):
            size = bits[q] & np.uint32(0x7FFFFFFF)
            # Round to nearest, ties to even. A carry from the mantissa into the exponent gives the right number.
            up = np.uint32(0x7FFF) + ((size >> np.uint32(16)) & np.uint32(1))
            nearest = np.uint32(size + up) & np.uint32(0xFFFF0000)
            nearest = min(nearest, largest) if nearest >= normal else np.uint32(0)
            nearest = nearest if size < infinity else size | (np.uint32(size > infinity) << np.uint32(22))
            nearest |= bits[q] & np.uint32(0x80000000)
            out[q] = np.uint16(nearest >> np.uint32(16))
            exact, rounded = np.float64(row[q]), np.float64(np.uint32(nearest).view(np.float32))
            whole += exact * exact
            kept += rounded * rounded
            lost += (exact - rounded) * (exact - rounded)
        squares[0, i], squares[1, i], squares[2, i] = whole, kept, lost


def _above(x: torch.Tensor) -> torch.Tensor:
    """Round x >= 0 (n,) up to bfloat16 (n, 1). The result is never zero, since zero times infinity would be NaN."""
    return (x * (1 + 2.0**-7)).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()[:, None]


def upper_products(a: torch.Tensor, b: torch.Tensor) -> Callable[[slice, slice, torch.Tensor], None]:
    """A function that writes the bits of a tile of ``a b^T`` to a uint16 tile; a (n, e) and b (m, e) are bfloat16."""

    def fill(rows: slice, columns: slice, out: torch.Tensor) -> None:
        torch.mm(a[rows], b[columns].T, out=out.view(torch.bfloat16))

    return fill


def _smallest_screened(
    pair: tuple[torch.Tensor, torch.Tensor], v: torch.Tensor, kept: int, tile: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    return smallest(len(pair[0]), v.float(), kept, tile or TILE, upper_products(*pair), torch.uint16)


def screened_topk(
    pair: tuple[torch.Tensor, torch.Tensor],
    v: torch.Tensor,
    k: int,
    sizes: torch.Tensor,
    tile: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`row_topk` at precision "bf16", from a :func:`screening_pair` and its ``term_sizes``, kept by the caller."""
    values, items = _smallest_screened(pair, v, k + 1, tile)
    return _lists(values, items, v, k, product_error(sizes, v, pair[0].shape[1], torch.float32))


def _screened_pair(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor]:
    gathered_pairs = [
        (a, gathered(b, arguments.b_index, inner))
        for (a, b), inner in zip(arguments.pairs, arguments.contraction_index, strict=True)
    ]
    return screening_pair(gathered_pairs)


def _smallest_products(arguments: RowArguments, kept: int) -> tuple[np.ndarray, np.ndarray]:
    dtype = result_dtype(arguments.a[0])
    fill = products(arguments.pairs, arguments.b_index, arguments.contraction_index)
    return smallest(len(arguments.a[0]), arguments.v.to(dtype), kept, arguments.tile or TILE, fill)


def row_topk(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply in float32 (float64 for float64), or in bfloat16 for ``precision="bf16"``, a tile at a time.

    Half-precision factors are widened, and B is gathered, a tile at a time. At "bf16" the factors are rounded and
    gathered once, costs are at most the true ones, and ``sizes`` are not used.
    """
    v, k = arguments.v, arguments.k
    if arguments.precision == "bf16":
        pair = _screened_pair(arguments)
        return screened_topk(pair, v, k, term_sizes([pair]), arguments.tile)
    values, items = _smallest_products(arguments, k + 1)
    error = product_error(arguments.term_sizes(), v, arguments.depth, torch.from_numpy(values).dtype)
    return _lists(values, items, v, k, error)


def _lists(
    values: np.ndarray, items: np.ndarray, v: torch.Tensor, k: int, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`row_topk` returns, from the k + 1 smallest ``c - v`` of each row and a bound on their rounding."""
    value, index = torch.from_numpy(values), torch.from_numpy(items[:, :k].astype(np.int64))
    duals = v.to(value.dtype)
    listed = index >= 0
    if len(v):
        shift = torch.where(listed, duals[index.clamp(min=0)], 0)
        costs = torch.where(listed, value[:, :k] + shift, torch.inf)
    else:
        costs = value[:, :k].clone()
    outside = value[:, k]
    if k == 0 and len(v):
        outside = torch.full_like(outside, -torch.inf)
    bound = (outside.double() - error).to(value.dtype)
    below = bound.nextafter(bound.new_tensor(-torch.inf))
    return index, costs, torch.where(outside.isfinite(), below, outside)


def row_min(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep one entry of each row, computed as by :func:`row_topk`."""
    if arguments.precision == "bf16":
        values, items = _smallest_screened(_screened_pair(arguments), arguments.v, 1, ())
    else:
        values, items = _smallest_products(arguments, 1)
    return torch.from_numpy(values)[:, 0], torch.from_numpy(items[:, 0].astype(np.int64))
