"""Costs that are never stored: inner products or distances between the rows of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmatch.kernels import dispatch
from fastmatch.kernels.cpu.parallel import over_rows

__all__ = ["DenseCost", "FactorCost"]

TILE = (1024, 8192)
"""Rows and columns of a tile on the CPU: 32 MB in float32, large enough for BLAS on all cores."""

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

    Factors stay on their device, and rows are read there, through :mod:`fastmatch.kernels.dispatch`: on a GPU by a
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
        backend: of the row reductions, as in :func:`fastmatch.kernels.dispatch.row_topk`; None: by the device.

    Raises:
        ValueError: factors that do not fit together or are not finite; an unknown metric.
        TypeError: factors that are no floating-point matrices.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Any, Any]],
        metric: str = "dot",
        tile: tuple[int, int] = TILE,
        backend: str | None = None,
    ) -> None:
        if metric not in ("dot", "l2", "l1"):
            raise ValueError(f"metric: expected 'dot', 'l2' or 'l1', got {metric!r}")
        if not len(factors):
            raise ValueError("factors: expected at least one pair, got none")
        if len(tile) != 2 or min(tile) < 1:
            raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
        pairs = [(_factor(a, metric), _factor(b, metric)) for a, b in factors]
        flat = [x for pair in pairs for x in pair]
        dispatch.backend_of(*flat, backend=backend)
        self.device, self.backend = flat[0].device, backend
        stored = _common_dtype(flat, metric)
        self.dtype = torch.float64 if stored == torch.float64 else torch.float32
        self.pairs = [(a.to(stored).contiguous(), b.to(stored).contiguous()) for a, b in pairs]
        self.shape = (len(pairs[0][0]), len(pairs[0][1]))
        for a, b in self.pairs:
            if (len(a), len(b)) != self.shape or a.shape[1] != b.shape[1]:
                raise ValueError(
                    f"factors: expected ({self.shape[0]}, d) and ({self.shape[1]}, d), got {tuple(a.shape)} and {tuple(b.shape)}"
                )
            if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
                raise ValueError("factors: hold NaN or infinity")
        self.metric, self.tile = metric, (int(tile[0]), int(tile[1]))
        self.depth = sum(a.shape[1] for a, _ in self.pairs)
        # An entry's size, and the sum of the sizes of its terms, are at most this, by row.
        self._terms = self._sizes()
        self._size = self._terms.cpu().numpy()
        # l2 is an inner product but for terms of rows and of columns.
        self._squares = [_squares(self.pairs, side) for side in (0, 1)] if metric == "l2" else []
        largest = float(self._size.max(initial=0.0))
        if not largest < torch.finfo(self.dtype).max / 4:
            raise ValueError(f"factors: their products overflow {self.dtype}; pass float64 or scale them")

    @property
    def T(self) -> FactorCost:
        """The transposed cost; the factors are shared."""
        return FactorCost([(b, a) for a, b in self.pairs], self.metric, self.tile, self.backend)

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
            from fastmatch.kernels.reference.cost_rows import entries

            at, which = (torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (rows, items))
            found = entries(self.pairs, at, which, self.metric)
            return torch.where(which < 0, found, sign * found).cpu().numpy()
        from fastmatch.kernels.cpu.cost_rows import DISTANCES, rescore

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
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices (r, k), bound (r,) float64): lists as tiles see them, and a valid bound on the rest."""
        whole = len(rows) and rows[-1] - rows[0] + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        index = slice(int(rows[0]), int(rows[-1]) + 1) if whole else torch.from_numpy(rows).to(self.device)
        duals = torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(self.device)
        sizes = self._terms[index]
        if self.metric == "l1":
            return self._nearest_l1([a[index] for a, _ in self.pairs], duals, k, sizes, sign)
        factors, duals = self._as_products(duals, sign, index)
        backend = self.backend
        if self._in_float64() or (self.device.type != "cpu" and backend is None and k > LONGEST):
            backend = "reference"
        found, _, bound = dispatch.row_topk(factors, duals, k, sizes=sizes, tile=self.tile, backend=backend)
        bound = bound.double()
        if self.metric == "l2":
            bound = bound + sign * self._squares[0][index]
        return found, bound

    def _as_products(
        self, duals: torch.Tensor, sign: float, rows: slice | torch.Tensor = slice(None)
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """(factors, duals) under which dispatch's ``c = -(A . B)`` is ``sign * value - v``, up to a term of rows.

        ``sign |a - b|^2 - v = -(2 sign a . b) - (v - sign |b|^2) + sign |a|^2``.
        """
        scale = -sign if self.metric == "dot" else 2 * sign
        if self.metric == "l2":
            duals = duals - sign * self._squares[1]
        return [(a[rows] if scale == 1 else scale * a[rows], b) for a, b in self.pairs], duals

    def sinkhorn_duals(
        self, v: np.ndarray, temperatures: Sequence[float], sign: float = 1.0, relaxation: float = 1.0
    ) -> np.ndarray:
        """(m,) float64 column duals of the minimisation of ``sign * value``, from ``v``: see
        :func:`fastmatch.kernels.dispatch.sinkhorn_duals`. Square costs, not "l1".
        """
        if self.metric == "l1":
            raise ValueError("metric: Sinkhorn's duals take 'dot' or 'l2', got 'l1'")
        factors, start = self._as_products(torch.from_numpy(v).to(self.device), sign)
        backend = "reference" if self._in_float64() else self.backend
        duals = dispatch.sinkhorn_duals(
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
        from fastmatch.kernels.cpu.cost_rows import smallest
        from fastmatch.kernels.reference.cost_rows import product_error

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
        n, m = self.shape
        rows = np.arange(n) if rows is None else np.asarray(rows, np.int64)
        k = min(k, m)
        found, bound = self._nearest(v, k, rows, sign)
        items = found.cpu().numpy().astype(np.int32, copy=False)
        outside = np.full(len(rows), np.inf) if k == m else bound.cpu().numpy()
        return items, self._rescored(rows, items, sign), outside

    def row_min(self, v: np.ndarray, sign: float = 1.0, k: int = 4) -> np.ndarray:
        """(n,) least ``sign * value_ij - v_j``: never above the true one but for float64's rounding.

        The k smallest as tiles see them are computed again in float64; where the bound on the others does not
        settle the minimum, the row is read again with a longer list.
        """
        n, m = self.shape
        out = np.empty(n)
        rows = np.arange(n)
        while len(rows):
            items, costs, bound = self.row_topk(v, k, rows, sign)
            least = np.where(items >= 0, costs - v[items], np.inf).min(axis=1)
            settled = least <= bound
            out[rows] = np.minimum(least, bound)
            rows = rows[~settled]
            if k >= min(m, 32):
                break
            k = min(m, 8 * k)
        if len(rows) and self.dtype == torch.float32:
            # Ties within the tiles' rounding: once more with tiles in float64.
            doubled = FactorCost(
                [(a[torch.from_numpy(rows).to(a.device)].double(), b.double()) for a, b in self.pairs],
                self.metric,
                self.tile,
            )
            out[rows] = np.maximum(out[rows], doubled.row_min(v, sign, 1))
        return out

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
