"""The k smallest of ``c_ij - v_j`` per row and a bound on the rest, in plain torch: whole rows in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastmatch_kernels._factors import result_dtype
from fastmatch_kernels.gain.reference import gathered

__all__ = [
    "RowArguments",
    "cost",
    "entries",
    "product_error",
    "row_min",
    "row_topk",
    "term_sizes",
    "value_rows",
]

ENTRIES = 1 << 24
"""Entries computed at a time: 128 MB."""

Factors = Sequence[tuple[torch.Tensor, torch.Tensor]]


class RowArguments(NamedTuple):
    """Checked arguments of :func:`fastmatch_kernels.ops.row_topk` and, with k = 1, of ``row_min``."""

    a: Sequence[torch.Tensor]  # per pair (n, d), all of one dtype
    b: Sequence[torch.Tensor]  # per pair (m, d)
    v: torch.Tensor  # (m',)
    k: int
    b_index: torch.Tensor | None  # (m',) int64
    contraction_index: Sequence[torch.Tensor | None]  # per pair (d,) int64
    precision: str
    sizes: torch.Tensor | None = None  # (n,) float64, what term_sizes returns
    tile: Sequence[int] = ()  # rows and columns computed at a time, on CPU

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The factors pair by pair."""
        return list(zip(self.a, self.b, strict=True))

    @property
    def depth(self) -> int:
        """How many products an entry sums."""
        return sum(x.shape[1] for x in self.a)

    def term_sizes(self) -> torch.Tensor:
        """``sizes``, computed if they are not known."""
        return term_sizes(self.pairs, self.contraction_index) if self.sizes is None else self.sizes


def cost(factors: Factors, metric: str = "dot") -> torch.Tensor:
    """Return (n, m) float64: ``sum_k A_k B_k^T``, or the sum of squared L2 or of L1 distances between rows."""
    total = torch.zeros(len(factors[0][0]), len(factors[0][1]), dtype=torch.float64, device="cpu")
    for a, b in factors:
        a, b = a.double(), b.double()
        if metric == "dot":
            total += a @ b.T
        elif metric == "l2":
            total += (a[:, None] - b[None]).square().sum(-1)
        else:
            total += (a[:, None] - b[None]).abs().sum(-1)
    return total


def entries(factors: Factors, rows: torch.Tensor, items: torch.Tensor, metric: str = "dot") -> torch.Tensor:
    """Return (r, e) float64: entries of :func:`cost` at (rows[i], items[i, e]); inf where an item is -1."""
    out = torch.zeros(items.shape, dtype=torch.float64, device=items.device)
    depth = max((a.shape[1] for a, _ in factors), default=1)
    step = max(1, ENTRIES // max(1, items.shape[1] * depth))
    for lo in range(0, len(rows), step):
        here, there = rows[lo : lo + step], items[lo : lo + step].clamp(min=0)
        for a, b in factors:
            left, right = a[here].double()[:, None], b[there].double()
            if metric == "dot":
                out[lo : lo + step] += (left * right).sum(-1)
            elif metric == "l2":
                out[lo : lo + step] += (left - right).square().sum(-1)
            else:
                out[lo : lo + step] += (left - right).abs().sum(-1)
    return torch.where(items < 0, torch.inf, out)


def term_sizes(
    factors: Factors, contraction_index: Sequence[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """Return (n,) float64 ``sum_k |a_ik| max_j |b_jk|``: by Cauchy and Schwarz at least the sum of |terms| of an entry.

    Rows that are not finite count as 0: they have no rounding error. Each factor is read once.
    """
    first = factors[0][0]
    total = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    for position, pair in enumerate(factors):
        index = None if contraction_index is None else contraction_index[position]
        repeats = 1 if index is None or index.numel() == 0 else int(torch.bincount(index).max())
        rows, columns = (
            torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).nan_to_num(0, 0, 0) for x in pair
        )
        if columns.numel():
            total += rows * columns.max() * repeats**0.5
    return total


def product_error(sizes: torch.Tensor, v: torch.Tensor, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """Return (n,) float64 bounds on the rounding of ``c - v`` in ``dtype``: ``gamma_(d+8)`` times the sizes, and v's rounding.

    Terms below the smallest normal number may be flushed to zero: each adds at most that number.
    """
    info = torch.finfo(dtype)
    unit = (depth + 8) * info.eps
    finite = v[v.isfinite()].abs().double()
    largest = float(finite.max()) if finite.numel() else 0.0
    return unit / (1 - unit) * sizes + 4 * info.eps * (sizes + largest) + 4 * (depth + 4) * info.tiny


def value_rows(
    factors: Factors,
    v: torch.Tensor,
    b_index: torch.Tensor | None = None,
    contraction_index: Sequence[torch.Tensor | None] | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, c - v) in float64, a few rows at a time; NaN becomes inf."""
    contractions = contraction_index or [None] * len(factors)
    right = [
        gathered(b, b_index, inner).double() for (_, b), inner in zip(factors, contractions, strict=True)
    ]
    n, m = len(factors[0][0]), len(v)
    step = max(1, ENTRIES // max(1, m))
    for lo in range(0, n, step):
        value = -v.double().expand(min(step, n - lo), m)
        for (a, _), b in zip(factors, right, strict=True):
            value = value - a[lo : lo + step].double() @ b.T
        yield slice(lo, lo + step), value.nan_to_num(torch.inf, torch.inf, -torch.inf)


def row_topk(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort whole rows of float64."""
    v, k, n, m = arguments.v, arguments.k, len(arguments.a[0]), len(arguments.v)
    dtype = result_dtype(arguments.a[0])
    index = torch.full((n, k), -1, dtype=torch.int64, device=v.device)
    costs = torch.full((n, k), torch.inf, dtype=torch.float64, device=v.device)
    outside = torch.full((n,), torch.inf, dtype=torch.float64, device=v.device)
    for rows, value in value_rows(arguments.pairs, v, arguments.b_index, arguments.contraction_index):
        best, where = value.topk(min(k + 1, m), dim=1, largest=False)
        if k < m:
            outside[rows] = best[:, k] if k else -torch.inf
            best, where = best[:, :k], where[:, :k]
        listed = best < torch.inf
        index[rows, : best.shape[1]] = torch.where(listed, where, -1)
        shift = torch.where(listed, v.double()[where], 0) if m else best
        costs[rows, : best.shape[1]] = best + shift
    error = product_error(arguments.term_sizes(), v, arguments.depth, torch.float64)
    bound = (outside - error).to(dtype)
    below = bound.nextafter(torch.full_like(bound, -torch.inf))
    return index, costs.to(dtype), torch.where(outside.isfinite(), below, outside.to(dtype))


def row_min(arguments: RowArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the minima of whole rows of float64."""
    v, n = arguments.v, len(arguments.a[0])
    dtype = result_dtype(arguments.a[0])
    least = torch.full((n,), torch.inf, dtype=dtype, device=v.device)
    column = torch.full((n,), -1, dtype=torch.int64, device=v.device)
    if len(v):
        for rows, value in value_rows(arguments.pairs, v, arguments.b_index, arguments.contraction_index):
            best, where = value.min(dim=1)
            least[rows], column[rows] = best.to(dtype), torch.where(best < torch.inf, where, -1)
    return least, column
