"""Costs that are never stored: inner products or distances between the rows of factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fastmatch._internal.checks import check_choice
from fastmatch.assignment.cost import row_index
from fastmatch.assignment.reading import as_array
from fastmatch_kernels._dispatch import Backend, RowPrecision, backend_of
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = ["FactorCost", "Metric", "Precision"]

Metric = Literal["dot", "l2", "l1"]
"""What is computed between rows: the inner product, the squared Euclidean distance or the l1 distance."""

Precision = Literal["ieee", "bf16"]
"""The precision of the tiles that screen the entries."""

TILE = (1024, 8192)
"""Rows and columns of a tile on the CPU: 32 MB in float32, large enough for BLAS on all cores."""

CERTAIN = 0.5
"""Fraction of a coarse list that its bound must confirm. Rows with less are read again at once, in the next precision."""

LONGEST = 1 << 10
"""Entries per row that the Triton kernel selects. Longer lists, which few rows ask for, are sorted in float64."""

SAMPLE = 256
"""Rows that tell which multiple of the squared norms to start from."""

MULTIPLES = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Multiples of the squared norms that :meth:`FactorCost.first_duals` tries, relative to the ratio of norms."""


class FactorCost:
    """The (n, m) matrix ``sum_k A_k B_k^T``, or a sum of distances between rows, in the memory of its factors.

    The factors stay on their device, and rows are read there through :mod:`fastmatch_kernels`: by a Triton kernel on a GPU,
    by numba and BLAS on the CPU. Only a few numbers per row come to the host. float64 factors on a GPU are read by torch in
    float64; "l1" is computed on the host.

    Tiles in the factors' precision discard the entries that are too large to matter, by a margin that bounds the tiles'
    rounding. Every entry that a decision rests on is computed in float64 from the factors as stored (half precision
    is first widened to float32, without loss).

    Example:
        >>> a, b = torch.randn(300, 16), torch.randn(300, 16)
        >>> gain = fm.assignment.FactorCost([(a, b)])
        >>> fm.solve(gain, maximize=True).is_certified
        True

    Args:
        factors: pairs (n, d_k), (m, d_k), numpy or torch, finite.
        metric: "dot", "l2" (squared Euclidean distance) or "l1".
        tile: rows and columns that are computed at a time on the CPU.
        backend: of the row reductions, as in :func:`fastmatch_kernels.ops.row_topk`; None: by the device.
        precision: of the tiles: "ieee" is the factors' own. "bf16" screens rows with products of factors rounded to
            bfloat16 and reads in float32 the rows that these leave open; results are as exact. It needs a CPU with bfloat16
            matrix units to be fast, "dot" or "l2", and factors of at most float32. It has no effect on costs of up to
            2^24 entries, which :func:`fastmatch.assignment.select_solver` has computed once as a matrix. docs/design/kernels.md
            says when it pays.

    Raises:
        ValueError: factors that do not fit together or are not finite, an unknown metric, or a precision that is unknown or
            does not take these factors.
        TypeError: factors that are not floating-point matrices.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Any, Any]],
        metric: Metric = "dot",
        tile: tuple[int, int] = TILE,
        backend: Backend | None = None,
        precision: Precision = "ieee",
    ) -> None:
        check_choice("precision", precision, Precision)
        check_choice("metric", metric, Metric)
        _check_pairs(factors)
        if not isinstance(tile, (tuple, list)) or len(tile) != 2 or min(tile) < 1:
            raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
        pairs = [(_factor(a, metric), _factor(b, metric)) for a, b in factors]
        flat = [x for pair in pairs for x in pair]
        backend_of(*flat, backend=backend)
        self.device = flat[0].device
        self.backend: Backend | None = backend
        stored = _common_dtype(flat, metric)
        self.dtype = torch.float64 if stored == torch.float64 else torch.float32
        self.metric: Metric = metric
        self.precision: Precision = precision
        self._check_precision()
        self.pairs = [(a.to(stored).contiguous(), b.to(stored).contiguous()) for a, b in pairs]
        self.shape = (len(pairs[0][0]), len(pairs[0][1]))
        for a, b in self.pairs:
            if (len(a), len(b)) != self.shape or a.shape[1] != b.shape[1]:
                raise ValueError(
                    f"factors: expected ({self.shape[0]}, d) and ({self.shape[1]}, d), got {tuple(a.shape)} and {tuple(b.shape)}"
                )
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
        fits = largest < torch.finfo(self.dtype).max / 4  # not if a factor holds NaN
        if not (fits and all(self.shape)) and not all(
            bool(torch.isfinite(x).all()) for pair in self.pairs for x in pair
        ):
            raise ValueError("factors: hold NaN or infinity")
        if not fits:
            wider = "" if self.dtype == torch.float64 else "pass float64 or "
            raise ValueError(f"factors: their products overflow {self.dtype}; {wider}scale them")

    def __repr__(self) -> str:
        return f"FactorCost({self.shape[0]} x {self.shape[1]}, {self.metric!r}, {len(self.pairs)} pairs, {self.device})"

    @property
    def T(self) -> FactorCost:
        """The transposed cost; the factors are shared."""
        return FactorCost(
            [(b, a) for a, b in self.pairs], self.metric, self.tile, self.backend, self.precision
        )

    def _check_precision(self) -> None:
        """Raise ValueError if bfloat16 tiles do not take these factors."""
        if self.precision != "bf16":
            return
        if self.device.type != "cpu" or self.backend not in (None, "cpu"):
            raise ValueError(f"precision: 'bf16' needs backend 'cpu', got {self.backend or self.device}")
        if self.metric == "l1" or self.dtype == torch.float64:
            raise ValueError(
                f"precision: 'bf16' takes 'dot' or 'l2' of at most float32, got {self.metric!r} of {self.dtype}"
            )

    @property
    def _screening(self) -> tuple[RowPrecision, ...]:
        """The precisions of the tiles: rows that the first leaves open are read again in the next."""
        if self.precision == "bf16":
            return "bf16", "ieee"
        if self.device.type == "cpu" or self.pairs[0][0].dtype != torch.float32:
            return ("ieee",)
        return "fp16", "fp16x3"  # on matrix units

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
        """Return (n,) float64, a bound by row on the rounding of :meth:`entries`."""
        eps = np.finfo(np.float64).eps
        unit = (self.depth + 8) * eps
        return unit / (1 - unit) * self._size + (self.depth + 4) * 1e-307

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return (len(rows),) float64, the entries at (rows, cols)."""
        rows, cols = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
        return self._rescored(rows, cols[:, None].astype(np.int32), 1.0)[:, 0]

    def _rescored(self, rows: np.ndarray, items: np.ndarray, sign: float) -> np.ndarray:
        """Return the entries at (rows, items) times ``sign`` in float64; items (r, k), inf where an item is -1."""
        if self.device.type != "cpu":
            from fastmatch_kernels.row_topk import entries

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
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: RowPrecision
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (indices (r, k), bound (r,) float64): lists as tiles see them, and a valid bound on the rest."""
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
            from fastmatch_kernels.row_topk import row_topk

            found, _, bound = row_topk(
                factors, duals, k, sizes=sizes, precision=precision, tile=self.tile, backend=backend
            )
        bound = bound.double()
        if self.metric == "l2":
            bound = bound + sign * self._squares[0][index]
        return found, bound

    def _screened(
        self, duals: torch.Tensor, k: int, index: slice | torch.Tensor, sign: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Screen with bfloat16 tiles, as ``ops.row_topk`` does, but round the factors once for all calls."""
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
        """Return (factors, duals) for which the kernels' ``-(A . B) - duals`` is ``sign * value - v`` up to a term per row.

        ``sign |a - b|^2 - v = -(2 sign a . b) - (v - sign |b|^2) + sign |a|^2``.
        """
        scale = -sign if self.metric == "dot" else 2 * sign
        factors = [(a[rows] if scale == 1 else scale * a[rows], b) for a, b in self.pairs]
        return factors, self._shifted(duals, sign)

    def _shifted(self, duals: torch.Tensor, sign: float) -> torch.Tensor:
        return duals - sign * self._squares[1] if self.metric == "l2" else duals

    @property
    def has_soft_duals(self) -> bool:
        """Whether :meth:`sinkhorn_duals` takes this cost."""
        return self.metric != "l1"

    def first_duals(self, sign: float) -> np.ndarray:
        """Return (m,) float64 column duals: the multiple of the columns' squared norms with which rows want most columns.

        ``min -a.b`` is ``min |a - b|^2 / 2`` up to terms of rows and of columns, so ``v_j = -t |b_j|^2 / 2`` is close to tight
        if each row has a noisy copy of itself among the columns, with t near the ratio of norms. Independent factors
        need a smaller t. A sample of rows decides. Metrics other than "dot" start from zeros.
        """
        n, m = self.shape
        if self.metric != "dot":
            return np.zeros(m)
        norms, tops = np.zeros((2, max(n, m))), [0.0, 0.0]
        for side, size in enumerate(self.shape):
            factors = [pair[side] for pair in self.pairs]
            tops[side] = max((float(x.abs().max()) for x in factors if x.numel()), default=0.0)
            for x in factors if tops[side] > 0 else ():  # squares of large ones overflow
                norms[side, :size] += (x.double() / tops[side]).square().sum(1).cpu().numpy()
        squares = norms[1, :m]
        if not squares.max() > 0:
            return np.zeros(m)
        scale = tops[0] * tops[1] * float(np.sqrt(norms[0, :n].mean() / squares.mean()))
        rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
        best, most = np.zeros(m), -1
        for t in MULTIPLES:
            v = -0.5 * t * scale * squares
            wanted = len(np.unique(self.row_topk(v, 1, rows, sign)[0]))
            if wanted > most:
                best, most = v, wanted
        return best

    def sinkhorn_duals(
        self, v: np.ndarray, temperatures: Sequence[float], sign: float = 1.0, relaxation: float = 1.0
    ) -> np.ndarray:
        """Return (m,) float64 column duals of the minimisation of ``sign * value`` by Sinkhorn's iteration from ``v``.

        See :func:`fastmatch_kernels.ops.sinkhorn_duals`.

        Raises:
            ValueError: the metric is "l1".
        """
        if self.metric == "l1":
            raise ValueError("metric: Sinkhorn's duals take 'dot' or 'l2', got 'l1'")
        largest = float(self._size.max(initial=0.0))
        if self.dtype == torch.float64 and self.device.type == "cpu" and largest > 0:
            # The compiled kernel reads float32. Any duals are good to start from, and these are near enough.
            narrow, steps = self._in_float32(largest), [t / largest for t in temperatures]
            return largest * narrow.sinkhorn_duals(v / largest, steps, sign, relaxation)
        factors, start = self._as_products(torch.from_numpy(v).to(self.device), sign)
        backend = "reference" if self._in_float64() else self.backend
        from fastmatch_kernels.row_softmin import sinkhorn_duals

        duals = sinkhorn_duals(
            factors, temperatures, v=start, relaxation=relaxation, backend=backend
        ).double()
        if self.metric == "l2":
            duals = duals + sign * self._squares[1]
        return duals.cpu().numpy()

    def _in_float32(self, largest: float) -> FactorCost:
        """Return the cost divided by its largest size, in float32."""

        def scaled(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            left, right = largest**-0.5, largest**-0.5
            if self.metric == "dot":  # one side may be as much larger as the other is smaller
                left = 1 / (float(a.abs().max()) or 1.0)
                right = 1 / (left * largest)
            return (a * left).float(), (b * right).float()

        pairs = [scaled(a, b) for a, b in self.pairs]
        return FactorCost(pairs, self.metric, self.tile, self.backend)

    def _in_float64(self) -> bool:
        """Return whether the device has no kernel for these factors, so that the reference reads them."""
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
        """Return the k columns of least ``sign * c - v`` of each row: see :meth:`Cost.row_topk`.

        Columns are ordered by the tiles' values.
        """
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        first, *then = self._screening
        items, costs, bound = self._lists(v, k, rows, sign, first)
        if then:
            certain = (costs - v[items] <= bound[:, None]).sum(axis=1)
            again = np.flatnonzero(certain < CERTAIN * items.shape[1])
            if len(again):
                items[again], costs[again], bound[again] = self._lists(v, k, rows[again], sign, then[0])
        return items, costs, bound

    def _lists(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: RowPrecision
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what :meth:`row_topk` returns, from tiles in one precision."""
        m = self.shape[1]
        k = min(k, m)
        found, bound = self._nearest(v, k, rows, sign, precision)
        items = found.cpu().numpy().astype(np.int32, copy=False)
        outside = np.full(len(rows), np.inf) if k == m else bound.cpu().numpy()
        return items, self._rescored(rows, items, sign), outside

    def row_min(self, v: np.ndarray, sign: float = 1.0, k: int = 4) -> np.ndarray:
        """Return (n,) float64, the least ``sign * c - v`` of each row; never above the true one but for rounding.

        The k smallest entries as tiles see them are computed again in float64. If the bound on the others does not settle
        the minimum, the row is read again with a longer list, and then at the next higher precision.
        """
        out = np.empty(self.shape[0])
        rows = np.arange(self.shape[0])
        for precision in self._screening:
            rows = self._settle(v, k, rows, sign, precision, out)
        if len(rows) and self.dtype == torch.float32:
            # Ties within the tiles' rounding need tiles in float64.
            doubled = FactorCost(
                [(a[torch.from_numpy(rows).to(a.device)].double(), b.double()) for a, b in self.pairs],
                self.metric,
                self.tile,
            )
            out[rows] = np.maximum(out[rows], doubled.row_min(v, sign, 1))
        return out

    def _settle(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float, precision: RowPrecision, out: np.ndarray
    ) -> np.ndarray:
        """Write valid minima of ``rows`` to ``out``; return the rows whose minimum lists of 32 leave open."""
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
        """Return the whole matrix in float64, on the host."""
        total = (
            torch.from_numpy(np.empty(self.shape))  # numpy asks for huge pages
            if self.device.type == "cpu"
            else torch.empty(self.shape, dtype=torch.float64, device=self.device)
        )
        for k, (a, b) in enumerate(self.pairs):
            a, b = a.double(), b.double()
            if self.metric == "l1":
                distances = torch.cdist(a, b, p=1)
                total = total + distances if k else distances
                continue
            # Twice a number is exact.
            addmm_nt(total, a if self.metric == "dot" else -2 * a, b, beta=min(k, 1))
            if self.metric == "l2":
                total += a.square().sum(1, keepdim=True)
                total += b.square().sum(1)
        return total.cpu().numpy()


def _check_pairs(factors: object) -> None:
    """Raise unless ``factors`` is a sequence of pairs."""
    pairs = list(factors) if isinstance(factors, Sequence) and not isinstance(factors, str) else [None]
    if not pairs:
        raise ValueError("factors: expected at least one pair, got none")
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            given = type(factors if pair is None else pair).__name__
            raise TypeError(f"factors: expected pairs of matrices such as [(a, b)], got {given}")


def _squares(pairs: list[tuple[torch.Tensor, torch.Tensor]], side: int) -> torch.Tensor:
    """Return the squared norms of the rows of one side, summed over the pairs, in float64."""
    return torch.stack([pair[side].double().square().sum(1) for pair in pairs]).sum(0)


def _common_dtype(factors: list[torch.Tensor], metric: str) -> torch.dtype:
    """Return one type for all factors. Half precision is kept if a GPU multiplies it as it is."""
    dtypes = {x.dtype for x in factors}
    if torch.float64 in dtypes:
        return torch.float64
    half = len(dtypes) == 1 and metric == "dot" and factors[0].device.type != "cpu"
    return next(iter(dtypes)) if half else torch.float32


def _factor(x: Any, metric: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        x = as_array(x, "factors")
        if x.dtype.kind == "f" and x.dtype.itemsize <= 8:
            # In this machine's byte order and aligned; torch takes only memory that may be written.
            x = torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ["C", "A", "W"]))
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"factors: expected floating-point matrices, got {getattr(x, 'dtype', type(x))}")
    if x.ndim != 2:
        raise ValueError(f"factors: expected matrices, got {x.ndim} dimensions")
    x = x.detach().resolve_neg()
    return x.cpu() if metric == "l1" else x
