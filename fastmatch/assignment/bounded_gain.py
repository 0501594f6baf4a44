"""Gains of which a prefix of the features is multiplied, and the rest is bounded until the proof holds.

A gain is ``g_ij = <a_i, b_j>`` over d features. If S are the features that were multiplied, then by Cauchy and Schwarz
``g_ij <= <a_i, b_j>_S + r_i s_j``, with the norms r_i and s_j of the other features. Where ``g_ij`` is known, it takes the
bound's place. An assignment that is optimal for these bounds and whose pairs are all known is optimal for the gain,
because no other assignment has a larger bound.

Near copies of cosine c need about ``(1 - c) / (1 - noise)`` of the features, where ``noise`` is the cosine of a row and the
most similar wrong column. A few rows tell that before the rest is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from fastmatch._internal.concurrent import IN_CACHE
from fastmatch.assignment.gap import duality_gap
from fastmatch.assignment.solution import Assignment
from fastmatch_kernels.inner_product import row_products, row_squares
from fastmatch_kernels.matrix_product import addmm_nt

__all__ = [
    "BoundedGain",
    "PrefixProducts",
    "add_product",
    "multiply",
    "multiply_if_bounds_pay",
    "solve_bounded",
]

JUDGED = 128
"""Features by which the share that a proof needs is predicted, and which are multiplied in any case."""

SAMPLE = 48
"""Rows of A that predict it."""

QUANTILE = 0.9
"""Fraction of these rows whose share is enough; rows that need more are multiplied by themselves."""

MARGIN = 1.1
"""The predicted share is multiplied by this."""

LEAST_SHARE = 0.01
"""Share of the features that is multiplied in any case. What it adds to a bound has to exceed the bound's rounding."""

LARGEST_SHARE = 0.6
"""Share of the features above which all of them are multiplied: norms, proofs and known entries take the rest of the time."""

COLLECTED = 512
"""Features of short prefixes that are multiplied at once."""

TURNS = 8
"""Solves after which all features are multiplied."""

MANY = 1 / 16
"""Fraction of the rows: if the bounds of more of them are too loose, the prefix grows; otherwise these rows are completed."""

EPS = float(torch.finfo(torch.float32).eps)

CAST = 8_000_000
"""Elements of a factor that are cast to float32 at a time. The copies are below 32 MiB, up to which the C library uses memory again
instead of asking the system for pages."""

SCALES = (1e-15, 1e30)
"""Least and largest size of a gain whose bounds are used: float32 does not overflow there, nor does underflow matter."""

Factors = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Pairs (n, d_k) and (n, d_k) on the CPU, of float32 at most; every iteration yields the same ones."""


class BoundedGain:
    """An (n, n) gain to be maximized, known by upper bounds that tighten on demand.

    It is a :class:`fastmatch.assignment.Cost` in that sense only. :func:`fastmatch.assignment.solve` alternates between an
    assignment of the bounds and better bounds where that assignment uses them.

    Attributes:
        bound: (n, n) float32; no entry is below the gain's. The rounding of its products is part of it.
        prefixes: the number of features of each factor that were multiplied for all rows.
        features: the number of features of each factor.
        is_whole: whether all of them were, so that ``bound`` is the gain as float32 products give it.
    """

    def __init__(
        self,
        factors: Factors,
        bound: torch.Tensor,
        prefixes: list[int],
        features: list[int],
        squares: torch.Tensor,
    ) -> None:
        """Turn the products of prefixes into bounds.

        Args:
            factors: the whole factors.
            bound: the products of the prefixes; written to.
            prefixes, features: see above.
            squares: (2, 2, n) float64: squared norms of the rows of A and B, over all features and over the rest.
        """
        self.factors, self.bound, self.prefixes, self.features = factors, bound, prefixes, features
        self.total, self.rest = squares
        self.shape: tuple[int, int] = (len(bound), len(bound))
        self.known = np.zeros(0, np.int64)  # sorted; row * n + column
        self.values = np.zeros(0)
        self.is_whole = False
        self._completed = torch.zeros(2, len(bound), dtype=torch.bool, device="cpu")
        self._outer = torch.zeros(2, len(bound), device="cpu")
        self._bound_rest()

    @property
    def share(self) -> float:
        """The fraction of the features that was multiplied for all rows."""
        return sum(self.prefixes) / sum(self.features)

    def __repr__(self) -> str:
        return f"BoundedGain({self.shape[0]} x {self.shape[1]}, share={self.share:.3g})"

    @property
    def T(self) -> BoundedGain:
        """The transposed gain. Its prefixes are multiplied anew, and none of its entries is known."""
        factors = [(b, a) for a, b in self.factors]
        bound = torch.zeros(self.shape, device="cpu")
        for prefix, (a, b) in zip(self.prefixes, factors, strict=True):
            add_product(bound, a[:, :prefix], b[:, :prefix])
        squares = torch.stack([self.total.flip(0), self.rest.flip(0)])
        return BoundedGain(factors, bound, list(self.prefixes), self.features, squares)

    def _bound_rest(self) -> None:
        """Replace the bounds of the rest by those that the present norms give, and write the known entries again.

        ``sqrt(r^2 + e |a|^2) sqrt(s^2 + e |b|^2) >= r s + e |a| |b|``, so e adds the rounding of float32 products, of the
        sums and of the bounds themselves.
        """
        outer = (self.rest.clamp(min=0) + self._rounding(self.prefixes) * self.total).sqrt().float()
        self.bound.addr_(self._outer[0], self._outer[1], alpha=-1).addr_(*outer)
        self._outer = outer
        self._write(self.known, self.values)

    def _rounding(self, multiplied: list[int]) -> float:
        """A bound on all rounding in float32, in units of the product of two rows' norms.

        A sum of d products is off by at most d / 2 times EPS. A matrix product adds sums of at least 64 terms to the bound, and
        the steps from one bound to the next add less than 64 numbers. Short prefixes are multiplied at once, up to COLLECTED
        features. Squares are added in float64.

        Args:
            multiplied: the features of each factor that enter the products.
        """
        return (max(*multiplied, COLLECTED) + sum(multiplied) / 64 + len(self.features) + 64) * EPS

    def _write(self, places: np.ndarray, values: np.ndarray) -> None:
        """Write known entries, rounded up."""
        stored = values.astype(np.float32)
        stored = np.where(stored < values, np.nextafter(stored, np.float32(np.inf)), stored)
        self.bound.view(-1)[torch.from_numpy(places)] = torch.from_numpy(stored)

    def unknown(self, cols: np.ndarray) -> np.ndarray:
        """Return the rows whose entry at ``cols`` is only bounded."""
        places = np.arange(len(cols)) * self.shape[1] + cols
        return np.flatnonzero(~np.isin(places, self.known, assume_unique=True))

    def learn(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Compute entries whose bounds were used."""
        self.note(rows, cols, self.entries(rows, cols))

    def note(self, rows: np.ndarray, cols: np.ndarray, values: np.ndarray) -> None:
        """Take entries that are known, and were not before."""
        places = rows * self.shape[1] + cols
        self._write(places, values)
        known, values = np.concatenate([self.known, places]), np.concatenate([self.values, values])
        order = np.argsort(known)
        self.known, self.values = known[order], values[order]

    def matched(self, cols: np.ndarray) -> np.ndarray:
        """Return (n,) float64, the known entries at ``cols``."""
        places = np.arange(len(cols)) * self.shape[1] + cols
        return self.values[np.searchsorted(self.known, places)]

    def complete(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Multiply all features of some rows and of some columns."""
        for side, units in enumerate((rows, cols)):
            picked = torch.from_numpy(units)
            picked = picked[~self._completed[side, picked]]
            if not len(picked):
                continue
            part = torch.zeros(len(picked), self.shape[1], device="cpu")
            for pair in self.factors:
                add_product(part, pair[side][picked], pair[1 - side])
            sizes = self.total.sqrt()
            part += (self._rounding(self.features) * sizes[side, picked] * sizes[1 - side].max()).float()[
                :, None
            ]
            (self.bound if side == 0 else self.bound.T)[picked] = part
            self._completed[side, picked] = True
        self._write(self.known, self.values)

    def grow(self, share: float) -> None:
        """Multiply longer prefixes. Rows and columns that are complete stay so."""
        rows, cols = self._completed
        kept = self.bound[rows], self.bound[:, cols]
        for k, (a, b) in enumerate(self.factors):
            lo, hi = self.prefixes[k], math.ceil(share * self.features[k])
            if hi > lo:
                a, b = a[:, lo:hi], b[:, lo:hi]
                add_product(self.bound, a, b)
                for rest, x in zip(self.rest, (a, b), strict=True):
                    rest -= row_squares(x)
                self.prefixes[k] = hi
        self._bound_rest()
        self.bound[rows], self.bound[:, cols] = kept
        self._write(self.known, self.values)

    def full(self) -> torch.Tensor:
        """Return the whole gain; it takes the place of its bounds."""
        for k, (a, b) in enumerate(self.factors):
            add_product(self.bound, a, b, accumulate=k > 0)
        self.prefixes, self.rest, self.is_whole = list(self.features), torch.zeros_like(self.rest), True
        self.known, self.values = self.known[:0], self.values[:0]
        return self.bound

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = -1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k columns of least bound of each row with their entries, and the next bound: see :meth:`Cost.row_topk`."""
        _check_sign(sign)
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        k = min(k, self.shape[1])
        least = -self.bound[torch.from_numpy(rows)].double() - torch.from_numpy(v)
        values, items = least.topk(min(k + 1, self.shape[1]), largest=False)
        items = items[:, :k].numpy().astype(np.int32)
        costs = -self.entries(np.repeat(rows, k), items.ravel().astype(np.int64)).reshape(items.shape)
        outside = values[:, k].numpy() if k < self.shape[1] else np.full(len(rows), np.inf)
        return items, costs, outside

    def row_min(self, v: np.ndarray, sign: float = -1.0) -> np.ndarray:
        """Return (n,) float64, the least ``-gain - v`` of each row. Entries that decide it become known."""
        _check_sign(sign)
        duals = torch.from_numpy(np.ascontiguousarray(v, np.float64))
        while True:
            out, cols = self._least(duals)
            rows = self.unknown(cols)
            if self.is_whole or not len(rows):
                return out
            self.learn(rows, cols[rows])

    def _least(self, duals: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The least ``-bound - v`` of each row, and its column."""
        out, cols = np.empty(self.shape[0]), np.empty(self.shape[0], np.int64)
        step = max(1, IN_CACHE // max(self.shape[1], 1))
        for lo in range(0, self.shape[0], step):
            part = slice(lo, lo + step)
            values, items = (-self.bound[part].double() - duals).min(1)
            out[part], cols[part] = values.numpy(), items.numpy()
        return out, cols

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return (len(rows),) float64, the gain at (rows, cols). It reads the factors once."""
        picked = torch.from_numpy(np.asarray(rows, np.int64)), torch.from_numpy(np.asarray(cols, np.int64))
        total = torch.zeros(len(picked[0]), dtype=torch.float64, device="cpu")
        for a, b in self.factors:
            total += row_products(a, b, *picked)
        return total.numpy()

    def entry_error(self) -> np.ndarray:
        """Return (n,) float64, a bound by row on the rounding of entries and of their stored bounds."""
        sizes = self.total.sqrt()
        unit = self._rounding(self.features) * (
            1.0 if self.is_whole else float(np.finfo(np.float64).eps) / EPS
        )
        error = unit * float(sizes[1].max()) * sizes[0].numpy()
        np.maximum.at(error, self.known // self.shape[1], EPS * np.abs(self.values))
        return error


def multiply(factors: Factors, largest_share: float = LARGEST_SHARE) -> BoundedGain | torch.Tensor:
    """Return a gain with bounds if these are expected to pay, else the whole gain.

    Args:
        factors: see :data:`Factors`.
        largest_share: the share of the features up to which bounds pay.

    Cost: one read of the factors, and the products. If the whole gain is returned, the prediction has cost the products of
    48 rows with 128 features.
    """
    products = PrefixProducts(largest_share)
    for a, b in factors:
        products.add(a, b)
    return products.finish(factors)


def multiply_if_bounds_pay(
    factors: Factors, features: int, largest_share: float = LARGEST_SHARE
) -> BoundedGain | None:
    """Return what :func:`multiply` does, but None if bounds are not expected to pay, once that is known.

    Args:
        factors: see :data:`Factors`.
        features: how many they have together.
        largest_share: the share of the features up to which bounds pay.
    """
    if features < JUDGED:
        return None
    products = PrefixProducts(largest_share, bounds_only=True)
    for a, b in factors:
        products.add(a, b)
        if not products.pays:
            return None
    found = products.finish(factors)
    return found if isinstance(found, BoundedGain) else None


class PrefixProducts:
    """A gain with bounds in the making. Its factors come one by one and need not be held.

    Args:
        largest_share: the share of the features up to which bounds pay.
        cols: (n,) columns whose entries are computed on the way, one for each row. If the rows have their copies there, the
            factors are not needed again.
        bounds_only: multiply nothing once bounds are known not to pay; the products are of no use then.
    """

    def __init__(
        self, largest_share: float, cols: torch.Tensor | None = None, *, bounds_only: bool = False
    ) -> None:
        self.largest_share, self.cols, self.share = largest_share, cols, 1.0
        self.bounds_only = bounds_only
        self._forecast: _Forecast | None = None
        self._out = self._squares = torch.empty(0, device="cpu")
        self._values = torch.zeros(0 if cols is None else len(cols), dtype=torch.float64, device="cpu")
        self._prefixes: list[int] = []
        self._features: list[int] = []
        self._short: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def pays(self) -> bool:
        """Whether bounds are expected to pay, as far as the factors are known."""
        return self.share < 1.0 or self._forecast is None or self._forecast.features < JUDGED

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add one factor."""
        if self._forecast is None:
            self._out, self._forecast = torch.zeros(len(a), len(b), device="cpu"), _Forecast(len(a))
            self._squares = torch.zeros(2, 2, len(a), dtype=torch.float64, device="cpu")
        at_least = self._forecast.add(a, b)
        if at_least:
            self.share = self._forecast.share(self.largest_share)
        if self.bounds_only and not self.pays:
            return
        self._features.append(a.shape[1])
        self._prefixes.append(max(at_least, math.ceil(self.share * a.shape[1])))
        first = slice(self._prefixes[-1])
        self._multiply(a[:, first], b[:, first])
        if self.pays:
            for side, x in enumerate((a, b)):
                whole = row_squares(x)
                self._squares[0, side] += whole
                self._squares[1, side] += whole - row_squares(x[:, first])
        if self.cols is not None:
            self._values += row_products(a, b, torch.arange(len(a), device="cpu"), self.cols)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the products of a prefix. Short ones are collected, because each product reads and writes the gain."""
        if a.shape[1] >= COLLECTED:
            add_product(self._out, a, b)
            return
        if sum(x.shape[1] for x, _ in self._short) + a.shape[1] > COLLECTED:
            self._multiply_short()
        self._short.append((_cast_copy(a), _cast_copy(b)))  # a slice would hold the whole factor

    def _multiply_short(self) -> None:
        if self._short:
            a, b = (torch.cat([pair[side] for pair in self._short], 1) for side in (0, 1))
            addmm_nt(self._out, a, b)
            self._short = []

    def finish(self, factors: Factors) -> BoundedGain | torch.Tensor:
        """Return the gain.

        Args:
            factors: those that were added, for entries that are needed later.
        """
        self._multiply_short()
        if self.share == 1.0:
            return self._out
        gain = BoundedGain(factors, self._out, self._prefixes, self._features, self._squares)
        if self.cols is not None:
            gain.note(np.arange(len(self.cols)), self.cols.numpy(), self._values.numpy())
        scale = float(self._squares[0].amax(1).prod().sqrt())
        return gain if SCALES[0] < scale < SCALES[1] else gain.full()


def solve_bounded(
    gain: BoundedGain, warm_start: Assignment | None, solve: Callable[..., Assignment]
) -> Assignment:
    """Return the assignment of largest total gain.

    Args:
        gain: its bounds become tighter.
        warm_start: a solution of a problem of the same shape and sense.
        solve: maximizes over a matrix; takes ``warm_start``.
    """
    n, found = gain.shape[0], warm_start or _near_copies(gain)
    if gain.is_whole:
        return solve(gain.bound, warm_start=found)
    for turn in range(TURNS):
        found = solve(gain.bound, warm_start=found)
        rows = gain.unknown(found.col_ind)
        if not len(rows):
            return _proved(gain, found)
        if turn and len(rows) > MANY * n:
            share = 2 * gain.share
            if share > LARGEST_SHARE:
                break
            gain.grow(share)
        elif turn > 1:
            gain.complete(rows, found.col_ind[rows])
        gain.learn(rows, found.col_ind[rows])
    found = solve(gain.full(), warm_start=found)
    found.stats["share"] = 1.0
    return found


def _near_copies(gain: BoundedGain) -> Assignment:
    """Return first duals. ``<a, b> <= |a|^2 / 2 + |b|^2 / 2``, and copies are equal: so each row wants its copy at once."""
    n, duals = gain.shape[0], (gain.total / 2).numpy()
    return Assignment(np.arange(n), np.arange(n), duals[0], duals[1], math.nan, math.inf, 0.0)


def _proved(gain: BoundedGain, found: Assignment) -> Assignment:
    """Return the solution of the bounds as one of the gain: its duals are feasible there."""
    matched = gain.matched(found.col_ind)
    gap, gap_bound = duality_gap(-matched, -found.u, -found.v, found.col_ind)
    gap_bound += found.gap_bound + 3 * float(gain.entry_error().sum())
    stats = {**found.stats, "share": gain.share}
    objective = math.fsum(matched.tolist())
    return Assignment(found.row_ind, found.col_ind, found.u, found.v, objective, gap, gap_bound, stats)


class _Forecast:
    """The share of the features that a proof will need, from a few rows and the first features."""

    def __init__(self, n: int) -> None:
        self.rows = torch.linspace(0, n - 1, min(n, SAMPLE), device="cpu").long()
        self.products = torch.zeros(len(self.rows), n, device="cpu")
        self.squares = torch.zeros(len(self.rows), device="cpu"), torch.zeros(n, device="cpu")
        self.features = 0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> int:
        """Count more features, up to those that are judged by; return how many."""
        count = min(JUDGED - self.features, a.shape[1])
        if count:
            a, b = a[self.rows, :count].float(), b[:, :count].float()
            addmm_nt(self.products, a, b)
            for total, x in zip(self.squares, (a, b), strict=True):
                total += x.square().sum(1)
            self.features += count
        return count

    def share(self, largest: float) -> float:
        """Return the share, 1 if it is above ``largest`` or too few features have been seen."""
        if self.features < JUDGED or self.products.shape[1] < 2:
            return 1.0
        sizes = (self.squares[0][:, None] * self.squares[1]).sqrt()
        cosines = torch.where(sizes > 0, self.products / sizes, 0.0)
        best, second = cosines.topk(2, dim=1).values.double().T
        needed = (1 - best).clamp(min=0) / (1 - second).clamp(min=1e-9)
        share = (
            MARGIN * float(needed[self.squares[0] > 0].quantile(QUANTILE)) if self.squares[0].any() else 1.0
        )
        return max(share, LEAST_SHARE) if share <= largest else 1.0  # NaN: 1


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, accumulate: bool = True) -> None:
    """Add ``a @ b.T`` to ``out``, in its dtype; or write it. Factors of another dtype are cast in parts."""
    parts = max(64, CAST // max(len(a), len(b), 1) // 64 * 64)  # as many terms as a bound's rounding expects
    step = max(1, a.shape[1]) if a.dtype == b.dtype == out.dtype else parts
    for x, y in zip(a.split(step, 1), b.split(step, 1), strict=True):
        addmm_nt(out, x.to(out.dtype), y.to(out.dtype), beta=int(accumulate))
        accumulate = True


def _cast_copy(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True)


def _check_sign(sign: float) -> None:
    if sign > 0:
        raise ValueError("cost: a BoundedGain has upper bounds only; pass maximize=True")
