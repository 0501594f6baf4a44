"""Costs that are never stored: inner products or distances between the rows of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmatch.assignment.parallel import over_rows

__all__ = ["DenseCost", "FactorCost"]

TILE = (1024, 8192)
"""Rows and columns of a tile: 32 MB in float32, large enough for BLAS on all cores."""

RESCORED = 1 << 12
"""Rows whose lists are computed again at once."""


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

    Example:
        >>> gain = FactorCost([(wa, wb), (va, vb)])
        >>> solve(gain, maximize=True).col_ind

    Entries are sums of products of the factors as stored (half precision is widened to float32 first, without
    loss). They are computed in float64 wherever a decision rests on them; tiles in the factors' precision only
    sort out what is too large to matter, by a margin that bounds their rounding.

    Args:
        factors: pairs (n, d_k), (m, d_k), numpy or torch, finite.
        metric: "dot", "l2" (squared Euclidean distance) or "l1".
        tile: rows and columns computed at a time.

    Raises:
        ValueError: factors that do not fit together or are not finite; an unknown metric.
        TypeError: factors that are no floating-point matrices.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Any, Any]],
        metric: str = "dot",
        tile: tuple[int, int] = TILE,
    ) -> None:
        if metric not in ("dot", "l2", "l1"):
            raise ValueError(f"metric: expected 'dot', 'l2' or 'l1', got {metric!r}")
        if not len(factors):
            raise ValueError("factors: expected at least one pair, got none")
        if len(tile) != 2 or min(tile) < 1:
            raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
        pairs = [(_factor(a), _factor(b)) for a, b in factors]
        double = any(x.dtype == torch.float64 for pair in pairs for x in pair)
        self.dtype = torch.float64 if double else torch.float32
        self.pairs = [(a.to(self.dtype).contiguous(), b.to(self.dtype).contiguous()) for a, b in pairs]
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
        self._size = self._sizes()
        largest = float(self._size.max(initial=0.0))
        if not largest < torch.finfo(self.dtype).max / 4:
            raise ValueError(f"factors: their products overflow {self.dtype}; pass float64 or scale them")

    @property
    def T(self) -> FactorCost:
        """The transposed cost; the factors are shared."""
        return FactorCost([(b, a) for a, b in self.pairs], self.metric, self.tile)

    def _sizes(self) -> np.ndarray:
        total = np.zeros(self.shape[0])
        if 0 in self.shape:
            return total
        order = 1 if self.metric == "l1" else 2
        for a, b in self.pairs:
            rows, columns = (
                torch.linalg.vector_norm(x, ord=order, dim=1, dtype=torch.float64).numpy() for x in (a, b)
            )
            if self.metric == "dot":
                total += rows * columns.max()
            elif self.metric == "l2":
                total += (rows + columns.max()) ** 2
            else:
                total += rows + columns.max()
        return total

    def tile_error(self, v: np.ndarray) -> np.ndarray:
        """(n,) bound on the rounding of a tile's ``c - v``: ``gamma_(d+4)`` times the terms' size, v's rounding.

        Terms below the smallest normal number may be flushed to zero: each adds at most that number.
        """
        info = torch.finfo(self.dtype)
        unit = (self.depth + 8) * info.eps
        largest = float(np.abs(v[np.isfinite(v)]).max(initial=0.0))
        return (
            unit / (1 - unit) * self._size
            + 4 * info.eps * (self._size + largest)
            + 4 * (self.depth + 4) * info.tiny
        )

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

    def _tile(
        self, a: list[torch.Tensor], lo: int, hi: int, v: torch.Tensor, sign: float, room: torch.Tensor
    ) -> torch.Tensor:
        """sign * value - v of some rows (given as their factors) and of columns lo..hi; l2 up to the rows' own norms."""
        # One buffer for all tiles: fresh pages would cost as much as the product.
        out = room[: len(a[0]) * (hi - lo)].view(len(a[0]), hi - lo)
        torch.neg(v[lo:hi].expand_as(out), out=out)
        for left, (_, b) in zip(a, self.pairs, strict=True):
            right = b[lo:hi]
            if self.metric == "dot":
                out.addmm_(left, right.T, alpha=sign)
            elif self.metric == "l2":
                out.addmm_(left, right.T, alpha=-2 * sign)
                out += sign * right.square().sum(1)
                out += sign * left.square().sum(1, keepdim=True)
            else:
                out.add_(torch.cdist(left, right, p=1), alpha=sign)
        return out

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
        from fastmatch.kernels.cpu.cost_rows import merge_tile

        n, m = self.shape
        rows = np.arange(n) if rows is None else np.asarray(rows, np.int64)
        k = min(k, m)
        kept = k + 1
        scalar = np.float64 if self.dtype == torch.float64 else np.float32
        duals = torch.from_numpy(np.ascontiguousarray(v)).to(self.dtype)
        error = self.tile_error(v)[rows]
        items_out = np.empty((len(rows), k), np.int32)
        costs_out = np.empty((len(rows), k))
        bound = np.empty(len(rows))
        height, width = self.tile
        room = torch.empty(min(height, len(rows)) * min(width, m), dtype=self.dtype)
        for lo in range(0, len(rows), height):
            part = rows[lo : lo + height]
            whole = len(part) and part[-1] - part[0] + 1 == len(part) and bool((np.diff(part) == 1).all())
            index = slice(int(part[0]), int(part[-1]) + 1) if whole else torch.from_numpy(part)
            left = [a[index] for a, _ in self.pairs]
            values = np.full((len(part), kept), np.inf, scalar)
            items = np.full((len(part), kept), -1, np.int32)
            for first in range(0, m, width):
                tile = self._tile(left, first, min(first + width, m), duals, sign, room).numpy()
                over_rows(
                    len(part),
                    tile.size // 8,  # most of a tile is passed over by one comparison of vectors
                    lambda a, b, tile=tile, first=first, values=values, items=items: merge_tile(
                        tile, a, b, first, values, items
                    ),
                )
            here = slice(lo, lo + len(part))
            items_out[here] = items[:, :k]
            costs_out[here] = self._rescored(part, items_out[here], sign)
            bound[here] = values[:, k] - error[here]
        if k == m:
            bound[:] = np.inf
        return items_out, costs_out, bound

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
                [(a[torch.from_numpy(rows)].double(), b.double()) for a, b in self.pairs],
                self.metric,
                self.tile,
            )
            out[rows] = np.maximum(out[rows], doubled.row_min(v, sign, 1))
        return out

    def dense(self) -> np.ndarray:
        """The whole matrix in float64."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for a, b in self.pairs:
            a, b = a.double(), b.double()
            if self.metric == "l1":
                total += torch.cdist(a, b, p=1)
            else:
                total.addmm_(a, b.T, alpha=1 if self.metric == "dot" else -2)
                if self.metric == "l2":
                    total += a.square().sum(1, keepdim=True)
                    total += b.square().sum(1)
        return total.numpy()


def _factor(x: Any) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x)
        x = torch.tensor(x) if not x.flags.writeable else torch.from_numpy(x)
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"factors: expected floating-point matrices, got {getattr(x, 'dtype', type(x))}")
    if x.ndim != 2:
        raise ValueError(f"factors: expected matrices, got {x.ndim} dimensions")
    x = x.detach().cpu()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
