"""Costs that are never stored: inner products or distances between the rows of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmatch_kernels import ops as kernels
from fastmatch_kernels._numba.parallel import over_rows

__all__ = ["DenseCost", "FactorCost", "row_index"]

TILE = (1024, 8192)
"""Rows and columns of a tile on the CPU: 32 MB in float32, large enough for BLAS on all cores."""

PRECISIONS = ("ieee", "bf16")

CERTAIN = 0.5
"""Share of a bfloat16 list that its bound must leave certain; rows with less are read in float32 at once."""

LONGEST = 1 << 10
"""Entries a row that the Triton kernel selects; longer lists, which few rows ask for, are sorted in float64."""


@dataclass(frozen=True)
class DenseCost:
    """A stored matrix as a cost object; :func:`fastmatch.assignment.solve` takes the matrix itself as well."""

    matrix: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return tuple(self.matrix.shape)


class FactorCost:
    """The (n, m) matrix ``sum_k A_k B_k^T`` (or a sum of distances between rows), in the memory of its factors.

    Factors stay on their device, and rows are read there, through :mod:`fastmatch_kernels`: on a GPU by a
    Triton kernel, on the CPU by its twin. What comes to the host is a few numbers a row. float64 factors on a GPU are
    read in float64 by torch; "l1" is computed on the host.

    Example:
        >>> gain = FactorCost([(wa, wb), (va, vb)])
        >>> solve(gain, maximize=True).col_ind

    Entries are sums of products of the factors as stored (half precision is widened to float32 first, without
    loss). They are computed in float64 wherever a decision rests on them; tiles in the factors' precision only
    sort out what is too large to matter, by a margin that bounds their rounding.

    Args:
        factors: pairs (n, d_k), (m, d_k), numpy or torch, finite.
        metric: "dot", "l2" (squared Euclidean distance) or "l1".
        tile: rows and columns computed at a time on the CPU.
        backend: of the row reductions, as in :func:`fastmatch_kernels.row_topk`; None: by the device.
        precision: of the tiles, "ieee" (the factors' own) or "bf16": rows are screened by products of factors rounded to
            bfloat16, and read in float32 where these leave too much open. Results are as exact. It is for CPUs with
            bfloat16 matrix units (elsewhere it is slow), "dot" and "l2", factors of at most float32, and shows where rows
            are read at all: costs that ``method="auto"`` stores are not. See docs/kernels.md for when it should pay.

    Raises:
        ValueError: factors that do not fit together or are not finite; an unknown metric; a precision that is unknown
            or does not take these factors.
        TypeError: factors that are no floating-point matrices.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Any, Any]],
        metric: str = "dot",
        tile: tuple[int, int] = TILE,
        backend: str | None = None,
        precision: str = "ieee",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
        if metric not in ("dot", "l2", "l1"):
            raise ValueError(f"metric: expected 'dot', 'l2' or 'l1', got {metric!r}")
        if not len(factors):
            raise ValueError("factors: expected at least one pair, got none")
        if len(tile) != 2 or min(tile) < 1:
            raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
        pairs = [(_factor(a, metric), _factor(b, metric)) for a, b in factors]
        flat = [x for pair in pairs for x in pair]
        kernels.backend_of(*flat, backend=backend)
        self.device, self.backend = flat[0].device, backend
        stored = _common_dtype(flat, metric)
        self.dtype = torch.float64 if stored == torch.float64 else torch.float32
        self.metric, self.precision = metric, precision
        self._check_precision()
        self.pairs = [(a.to(stored).contiguous(), b.to(stored).contiguous()) for a, b in pairs]
        self.shape = (len(pairs[0][0]), len(pairs[0][1]))
        for a, b in self.pairs:
            if (len(a), len(b)) != self.shape or a.shape[1] != b.shape[1]:
                raise ValueError(
                    f"factors: expected ({self.shape[0]}, d) and ({self.shape[1]}, d), got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
                raise ValueError("factors: hold NaN or infinity")
        self.tile = (int(tile[0]), int(tile[1]))
        self.depth = sum(a.shape[1] for a, _ in self.pairs)
        # An entry's size, and the sum of the sizes of its terms, are at most this, by row.
        self._terms = self._sizes()
        self._size = self._terms.cpu().numpy()
        # l2 is an inner product but for terms of rows and of columns.
        self._squares = [_squares(self.pairs, side) for side in (0, 1)] if metric == "l2" else []
        # By sign: what screening multiplies, made on first use.
        self._screens: dict[float, tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        largest = float(self._size.max(initial=0.0))
        if not largest < torch.finfo(self.dtype).max / 4:
            raise ValueError(f"factors: their products overflow {self.dtype}; pass float64 or scale them")

    @property
    def T(self) -> FactorCost:
        """The transposed cost; the factors are shared."""
        return FactorCost(
            [(b, a) for a, b in self.pairs], self.metric, self.tile, self.backend, self.precision
        )

    def _check_precision(self) -> None:
        """Screening is of the CPU twin, of inner products and of factors that float32 holds."""
        if self.precision != "bf16":
            return
        if self.device.type != "cpu" or self.backend not in (None, "cpu"):
            raise ValueError(f"precision: 'bf16' needs backend 'cpu', got {self.backend or self.device}")
        if self.metric == "l1" or self.dtype == torch.float64:
            raise ValueError(
                f"precision: 'bf16' takes 'dot' or 'l2' of at most float32, got {self.metric!r} of {self.dtype}"
            )

    def _sizes(self) -> torch.Tensor:
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        if 0 in self.shape:
            return total
        order = 1 if self.metric == "l1" else 2
        for a, b in self.pairs:
            rows, columns = (
                torch.linalg.vector_norm(x, ord=order, dim=1, dtype=torch.float64) for x in (a, b)
            )
            if self.metric == "dot":
                total += rows * columns.max()
            elif self.metric == "l2":
                total += (rows + columns.max()) ** 2
            else:
                total += rows + columns.max()
        return total

    def entry_error(self) -> np.ndarray:
        """(n,) bound on the rounding of :meth:`entries`, in float64."""
        eps = np.finfo(np.float64).eps
        unit = (self.depth + 8) * eps
        return unit / (1 - unit) * self._size + (self.depth + 4) * 1e-307

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """(len(rows),) float64: the entries at (rows, cols)."""
        rows, cols = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
        return self._rescored(rows, cols[:, None].astype(np.int32), 1.0)[:, 0]

    def _rescored(self, rows: np.ndarray, items: np.ndarray, sign: float) -> np.ndarray:
        if self.device.type != "cpu":
            from fastmatch_kernels.row_topk.reference import entries

            at, which = (torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (rows, items))
            found = entries(self.pairs, at, which, self.metric)
            return torch.where(which < 0, found, sign * found).cpu().numpy()
        from fastmatch_kernels.row_topk.cpu import DISTANCES, rescore

        out = np.zeros(items.shape)
        for a, b in self.pairs:
            left, right = a.numpy(), b.numpy()
            over_rows(
                len(rows),
                items.size * a.shape[1],
                lambda lo, hi, left=left, right=right: rescore(
                    left, right, rows, items, lo, hi, DISTANCES[self.metric], sign, out
                ),
            )
        return out

    def _nearest(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices (r, k), bound (r,) float64): lists as tiles see them, and a valid bound on the rest."""
        index = row_index(rows, self.device)
        duals = torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(self.device)
        sizes = self._terms[index]
        if self.metric == "l1":
            return self._nearest_l1([a[index] for a, _ in self.pairs], duals, k, sizes, sign)
        if precision == "bf16":
            found, bound = self._screened(duals, k, index, sign)
        else:
            factors, duals = self._as_products(duals, sign, index)
            backend = self.backend
            if self._in_float64() or (self.device.type != "cpu" and backend is None and k > LONGEST):
                backend = "reference"
            found, _, bound = kernels.row_topk(
                factors, duals, k, sizes=sizes, tile=self.tile, backend=backend
            )
        bound = bound.double()
        if self.metric == "l2":
            bound = bound + sign * self._squares[0][index]
        return found, bound

    def _screened(
        self, duals: torch.Tensor, k: int, index: slice | torch.Tensor, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dispatch's ``row_topk`` at precision "bf16", but the factors are rounded once for all calls."""
        from fastmatch_kernels.row_topk.cpu import screened_topk, screening_pair
        from fastmatch_kernels.row_topk.reference import term_sizes

        if sign not in self._screens:
            pair = screening_pair(self._as_products(duals, sign)[0])
            self._screens[sign] = pair, term_sizes([pair])
        (left, right), sizes = self._screens[sign]
        shifted = self._shifted(duals, sign)
        found, _, bound = screened_topk((left[index], right), shifted, k, sizes[index], self.tile)
        return found, bound

    def _as_products(
        self, duals: torch.Tensor, sign: float, rows: slice | torch.Tensor = slice(None)
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """(factors, duals) under which dispatch's ``c = -(A . B)`` is ``sign * value - v``, up to a term of rows.

        ``sign |a - b|^2 - v = -(2 sign a . b) - (v - sign |b|^2) + sign |a|^2``.
        """
        scale = -sign if self.metric == "dot" else 2 * sign
        factors = [(a[rows] if scale == 1 else scale * a[rows], b) for a, b in self.pairs]
        return factors, self._shifted(duals, sign)

    def _shifted(self, duals: torch.Tensor, sign: float) -> torch.Tensor:
        return duals - sign * self._squares[1] if self.metric == "l2" else duals

    def sinkhorn_duals(
        self, v: np.ndarray, temperatures: Sequence[float], sign: float = 1.0, relaxation: float = 1.0
    ) -> np.ndarray:
        """(m,) float64 column duals of the minimisation of ``sign * value``, from ``v``: see
        :func:`fastmatch_kernels.sinkhorn_duals`. Square costs, not "l1".
        """
        if self.metric == "l1":
            raise ValueError("metric: Sinkhorn's duals take 'dot' or 'l2', got 'l1'")
        factors, start = self._as_products(torch.from_numpy(v).to(self.device), sign)
        backend = "reference" if self._in_float64() else self.backend
        duals = kernels.sinkhorn_duals(
            factors, temperatures, v=start, relaxation=relaxation, backend=backend
        ).double()
        if self.metric == "l2":
            duals = duals + sign * self._squares[1]
        return duals.cpu().numpy()

    def _in_float64(self) -> bool:
        """Whether the device's kernels cannot read these factors, and the reference must."""
        return self.device.type != "cpu" and self.backend is None and self.dtype == torch.float64

    def _nearest_l1(
        self, left: list[torch.Tensor], duals: torch.Tensor, k: int, sizes: torch.Tensor, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from fastmatch_kernels.row_topk.cpu import smallest
        from fastmatch_kernels.row_topk.reference import product_error

        def fill(rows: slice, columns: slice, out: torch.Tensor) -> None:
            out.zero_()
            for a, (_, b) in zip(left, self.pairs, strict=True):
                out.add_(torch.cdist(a[rows], b[columns], p=1), alpha=sign)

        values, items = smallest(len(left[0]), duals.to(self.dtype), k + 1, self.tile, fill)
        error = product_error(sizes, duals, self.depth, self.dtype)
        return torch.from_numpy(items[:, :k]), torch.from_numpy(values[:, k]).double() - error

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k smallest of ``sign * value_ij - v_j`` per row, and a lower bound on all others.

        Args:
            v: (m,) float64.
            k: entries a row.
            rows: (r,) indices; None for all.
            sign: 1 or -1.

        Returns:
            (items (r, k) int32, costs (r, k) float64, bound (r,) float64), by rising computed ``c - v``; -1
            and inf where a row has fewer than k columns, and inf for a bound with nothing outside.
        """
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        items, costs, bound = self._lists(v, k, rows, sign, self.precision)
        if self.precision == "bf16":
            certain = (costs - v[items] <= bound[:, None]).sum(axis=1)
            again = np.flatnonzero(certain < CERTAIN * items.shape[1])
            if len(again):
                items[again], costs[again], bound[again] = self._lists(v, k, rows[again], sign, "ieee")
        return items, costs, bound

    def _lists(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What :meth:`row_topk` returns, from tiles in one precision."""
        m = self.shape[1]
        k = min(k, m)
        found, bound = self._nearest(v, k, rows, sign, precision)
        items = found.cpu().numpy().astype(np.int32, copy=False)
        outside = np.full(len(rows), np.inf) if k == m else bound.cpu().numpy()
        return items, self._rescored(rows, items, sign), outside

    def row_min(self, v: np.ndarray, sign: float = 1.0, k: int = 4) -> np.ndarray:
        """(n,) least ``sign * value_ij - v_j``: never above the true one but for float64's rounding.

        The k smallest as tiles see them are computed again in float64; where the bound on the others does not
        settle the minimum, the row is read again with a longer list, and then at the next higher precision.
        """
        out = np.empty(self.shape[0])
        rows = np.arange(self.shape[0])
        for precision in ("bf16", "ieee") if self.precision == "bf16" else ("ieee",):
            rows = self._settle(v, k, rows, sign, precision, out)
        if len(rows) and self.dtype == torch.float32:
            # Ties within the tiles' rounding: once more with tiles in float64.
            doubled = FactorCost(
                [(a[torch.from_numpy(rows).to(a.device)].double(), b.double()) for a, b in self.pairs],
                self.metric,
                self.tile,
            )
            out[rows] = np.maximum(out[rows], doubled.row_min(v, sign, 1))
        return out

    def _settle(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: str, out: np.ndarray
    ) -> np.ndarray:
        """Writes valid minima of ``rows`` to ``out``; returns the rows whose minimum lists of 32 leave open."""
        m = self.shape[1]
        while len(rows):
            items, costs, bound = self._lists(v, k, rows, sign, precision)
            least = np.where(items >= 0, costs - v[items], np.inf).min(axis=1)
            settled = least <= bound
            out[rows] = np.minimum(least, bound)
            rows = rows[~settled]
            if k >= min(m, 32):
                break
            k = min(m, 8 * k)
        return rows

    def dense(self) -> np.ndarray:
        """The whole matrix in float64."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for a, b in self.pairs:
            a, b = a.double(), b.double()
            if self.metric == "l1":
                total += torch.cdist(a, b, p=1)
            else:
                total.addmm_(a, b.T, alpha=1 if self.metric == "dot" else -2)
                if self.metric == "l2":
                    total += a.square().sum(1, keepdim=True)
                    total += b.square().sum(1)
        return total.cpu().numpy()


def row_index(rows: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """An index of the rows: a range, which copies nothing, where they follow each other."""
    if len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def _squares(pairs: list[tuple[torch.Tensor, torch.Tensor]], side: int) -> torch.Tensor:
    """Squared norms of the rows of one side, summed over the pairs, in float64."""
    return torch.stack([pair[side].double().square().sum(1) for pair in pairs]).sum(0)


def _common_dtype(factors: list[torch.Tensor], metric: str) -> torch.dtype:
    """One type for all: half precision stays what it is where the GPU multiplies it as it is."""
    dtypes = {x.dtype for x in factors}
    if torch.float64 in dtypes:
        return torch.float64
    half = len(dtypes) == 1 and metric == "dot" and factors[0].device.type != "cpu"
    return next(iter(dtypes)) if half else torch.float32


def _factor(x: Any, metric: str) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x)
        x = torch.tensor(x) if not x.flags.writeable else torch.from_numpy(x)
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"factors: expected floating-point matrices, got {getattr(x, 'dtype', type(x))}")
    if x.ndim != 2:
        raise ValueError(f"factors: expected matrices, got {x.ndim} dimensions")
    return x.detach().cpu() if metric == "l1" else x.detach()
