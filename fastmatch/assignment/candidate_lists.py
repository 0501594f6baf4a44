"""The solver for costs that answer questions about rows but store no matrix: shortlists read in batches.

The steps are those of the dense solver. What differs is that reading one row is dear and a thousand rows at once
are cheap (a product of matrices), so phases pass over the rows that need reading, and all of them are read together.
See docs/assignment.md.
"""

from __future__ import annotations

import numpy as np

from fastmatch.assignment.device import StoredCost
from fastmatch.assignment.factor import FactorCost

__all__ = ["solve_lists", "try_lists"]

K = 48
"""Entries of a first list: longer than the dense solver's, since a longer list costs little beside the product."""

SLICE = 1 << 20
FEW = 0.05
"""Share of rows left free by row reduction above which a short auction pays."""
SHORT, BIDS, LEFT_OVER = 0.02, 16, 1024
"""The short auction's eps, in spreads of the listed costs; bids a row at most; the share of rows it leaves to the paths."""
EASY = 0.3
RAISE, LOWER, LAST = 5.0, 8.0, 0.015
SAMPLE = 256
PATIENCE = 1.0
"""Refills per row after which shortest paths are given up for better duals: a pass over the cost."""
SWEEPS, TIED = 16, 0.1
"""Sweeps, and the share of rows whose list ends among equal entries, beyond which :func:`try_lists` gives up."""
SOFTEST, HARDEST, STEPS, RELAXATION = 1.0, 0.003, 40, 1.8
"""Sinkhorn's first and last temperature, in standard deviations of the costs: see bench/results/initial_duals.md."""
BATCH = 4096
"""Rows read at once at most, between which Ctrl-C is heard."""


def solve_lists(
    cost: FactorCost, sign: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Solves the minimisation of ``sign * cost``, n <= m; returns (col_of, u, v, counts), as the dense solver."""
    return ListSolve(cost, sign, start).run()


def try_lists(
    cost: StoredCost, sign: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """As :func:`solve_lists`, or None where lists do not suit the cost: a stored matrix can be solved otherwise.

    They do not suit where many equal entries end them, or where paths ask for more than :data:`PATIENCE` refills a row
    or :data:`SWEEPS` rounds of them.
    """
    return ListSolve(cost, sign, start).attempt()


class ListSolve:
    """The arrays of one solve (named as in fastmatch_kernels.lap.lists) and the steps on them."""

    def __init__(self, cost: FactorCost | StoredCost, sign: float, start: np.ndarray | None) -> None:
        from fastmatch_kernels.lap import lists as lap_lists

        self.lap, self.cost, self.sign = lap_lists, cost, sign
        n, m = self.n, self.m = cost.shape
        self.k = min(K, m)
        self.start = np.arange(n, dtype=np.int64) * self.k
        self.length = np.full(n, self.k, np.int64)
        self.used = n * self.k
        self.cols = np.empty(self.used, np.int32)
        self.costs = np.empty(self.used)
        self.bound = np.empty(n)
        self.row_of, self.col_of = np.full(m, -1, np.int64), np.full(n, -1, np.int64)
        self.cost_of = np.zeros(n)
        self.pending, self.waiting = np.empty(n, np.int64), np.zeros(n, np.uint8)
        self.version = np.full(n, -1, np.int64)
        self.counts = np.zeros(4, np.int64)
        self.v = self._first_duals(start)

    def _first_duals(self, start: np.ndarray | None) -> np.ndarray:
        if self.n != self.m or self.n < 2:
            return np.zeros(self.m)
        if start is not None and np.isfinite(start).all():
            return np.array(start, np.float64)
        return norm_shift(self.cost, self.sign) if isinstance(self.cost, FactorCost) else np.zeros(self.m)

    @property
    def lists(self) -> tuple[np.ndarray, ...]:
        return self.v, self.start, self.length, self.cols, self.costs, self.bound

    @property
    def matching(self) -> tuple[np.ndarray, ...]:
        return self.row_of, self.col_of, self.cost_of

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        cost = self.cost
        assert isinstance(cost, FactorCost)
        self.fill()
        self.begin()
        soft = self.n == self.m > 1 and cost.metric != "l1"
        if soft and (self.free() > EASY * self.n or not self.augment(PATIENCE * self.n)):
            self.soften()
        if self.n == self.m > 1 and self.free() > EASY * self.n:
            self.scaled_auction()
            self.reduce()
        self.augment()
        return self.result()

    def attempt(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """What :func:`try_lists` returns."""
        self.fill()
        ends = slice(self.k - 1, self.used, self.k)
        if (self.costs[ends] - self.v[self.cols[ends]] == self.bound).mean() > TIED:
            return None
        self.begin()
        return self.result() if self.augment(PATIENCE * self.n, SWEEPS) else None

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.col_of, self.cost.row_min(self.v, self.sign), self.v, self.counts

    def begin(self) -> None:
        """From first lists to a matching that leaves little to the paths."""
        self.reduce()
        if self.n == self.m > 1 and self.free() > FEW * self.n:
            self.short_auction()
            self.fill()  # one product, and the paths hardly ever wait for a row
            self.reduce()

    def free(self) -> int:
        return int((self.col_of < 0).sum())

    def fill(self) -> None:
        """First lists of all rows, at the duals as they are."""
        self.start, self.used = np.arange(self.n, dtype=np.int64) * self.k, self.n * self.k
        self.length.fill(self.k)
        everyone = np.arange(self.n)
        for lo in range(0, self.n, BATCH):
            self._fill(everyone[lo : lo + BATCH])

    def soften(self) -> None:
        """Begins again from Sinkhorn's duals, which leave the paths little to do: what they cost is known beforehand."""
        cost = self.cost
        assert isinstance(cost, FactorCost)
        spread = sampled_spread(cost)
        if not spread > 0:
            return
        temperatures = (spread * np.geomspace(SOFTEST, HARDEST, STEPS)).tolist()
        duals = cost.sinkhorn_duals(self._first_duals(None), temperatures, self.sign, RELAXATION)
        if np.isfinite(duals).all():
            self.v = duals
            self.fill()
            self.reduce()

    def _fill(self, rows: np.ndarray) -> None:
        """First lists: the pool holds them in order."""
        items, costs, bound = self.cost.row_topk(self.v, self.k, rows, self.sign)
        at = slice(int(rows[0]) * self.k, (int(rows[-1]) + 1) * self.k)
        self.cols[at], self.costs[at] = items.ravel(), costs.ravel()
        self.bound[rows] = bound

    def read(self, rows: np.ndarray, searching: bool) -> None:
        """Reads rows again. What a search waits for gets a longer list where a fresh one would not be news."""
        self.counts[self.lap.READS] += len(rows)
        length = self.length[rows]
        version = int(self.counts[self.lap.BIDS]) + self.n - self.free()
        if searching:
            longer = (self.live(rows) * 2 > length) | (self.version[rows] == version)
        else:
            longer = self.version[rows] == version
        self.version[rows] = version
        wanted = np.minimum(np.where(longer, 2 * length, length), self.m)
        for k in np.unique(wanted):
            group = np.sort(rows[wanted == k])
            step = max(1, min(BATCH, (1 << 24) // int(k)))
            for lo in range(0, len(group), step):
                part = group[lo : lo + step]
                items, costs, bound = self.cost.row_topk(self.v, int(k), part, self.sign)
                moved = part[self.length[part] != k]
                if len(moved):
                    self._reserve(len(moved) * int(k))
                    self.start[moved] = self.used + np.arange(len(moved)) * int(k)
                    self.length[moved] = k
                    self.used += len(moved) * int(k)
                place = self.start[part][:, None] + np.arange(int(k))
                self.cols[place], self.costs[place], self.bound[part] = items, costs, bound

    def live(self, rows: np.ndarray) -> np.ndarray:
        """How many entries of each row's list are still known to be its smallest."""
        out = np.empty(len(rows), np.int64)
        for k in np.unique(self.length[rows]):
            group = np.flatnonzero(self.length[rows] == k)
            for lo in range(0, len(group), BATCH):
                at = group[lo : lo + BATCH]
                place = self.start[rows[at]][:, None] + np.arange(int(k))
                values = self.costs[place] - self.v[self.cols[place]]
                out[at] = (values <= self.bound[rows[at]][:, None]).sum(axis=1)
        return out

    def _reserve(self, extra: int) -> None:
        """Room for ``extra`` entries: abandoned lists are dropped first, then the pool grows."""
        if self.used + extra <= len(self.cols):
            return
        live = int(self.length.sum())
        capacity = max(len(self.cols), live + extra + live // 4)
        cols, costs = np.empty(capacity, np.int32), np.empty(capacity)
        at = 0
        for i in range(self.n):
            old, size = int(self.start[i]), int(self.length[i])
            cols[at : at + size], costs[at : at + size] = (
                self.cols[old : old + size],
                self.costs[old : old + size],
            )
            self.start[i] = at
            at += size
        self.cols, self.costs, self.used = cols, costs, at

    def reduce(self) -> None:
        """Matches what the duals allow, then two passes of augmenting row reduction."""
        self.row_of.fill(-1)
        self.col_of.fill(-1)
        self.lap.greedy(*self.lists, *self.matching)
        for _ in range(2):
            free = np.flatnonzero(self.col_of < 0)
            if len(free):
                self.bid(free, 0.0, 2 * len(free))

    def bid(self, rows: np.ndarray, eps: float, bids: int, enough: int = 0) -> bool:
        """The auction among ``rows``; rows passed over are read together and bid again. False if bids ran out.

        Ends once ``enough`` rows or fewer are left, which would take more bids than all before them.
        """
        stack = np.zeros(self.n, np.int64)
        while len(rows) > enough:
            top = len(rows)
            stack[:top] = rows[::-1]
            waits = 0
            while top > enough:
                if bids <= 0:
                    return False
                part = min(bids, SLICE, self.n if enough else SLICE)
                top, waits = self.lap.auction(
                    *self.lists, *self.matching, stack, top, eps, part, self.pending, waits, self.counts
                )
                bids -= part
            rows = self.pending[:waits].copy()
            if len(rows) > enough:
                self.read(rows, False)
                # A row whose fresh list still does not settle its bid (ties) is left to the paths.
                rows = rows[self.live(rows) >= min(2, self.m)]
        return True

    def spread(self) -> float:
        """How far listed costs lie apart, the unit of the auctions' eps."""
        return float(self.costs[: self.n * self.k].reshape(self.n, self.k)[:, : self.k // 2].std())

    def short_auction(self) -> None:
        """One phase at a small eps, as in the dense solver: near-optimal duals make the searches after it short."""
        eps = SHORT * self.spread()
        if eps > 0:
            self.row_of.fill(-1)
            self.col_of.fill(-1)
            self.bid(np.arange(self.n), eps, BIDS * self.n, self.n // LEFT_OVER)

    def scaled_auction(self) -> None:
        """eps-scaling: phases of falling eps that keep the duals and drop the matching."""
        spread = self.spread()
        if not spread > 0:
            return
        everyone = np.arange(self.n)
        eps = spread
        self.row_of.fill(-1)
        self.col_of.fill(-1)
        for _ in range(8):
            if self.bid(np.flatnonzero(self.col_of < 0), eps, 16 * self.n):
                break
            eps *= RAISE
        while eps > LAST * spread * LOWER:
            eps /= LOWER
            self.row_of.fill(-1)
            self.col_of.fill(-1)
            self.bid(everyone, eps, 1000 * self.n)

    def augment(self, reads: float = np.inf, sweeps: float = np.inf) -> bool:
        """Sweeps of shortest augmenting paths over the free rows; what they wait for is read between sweeps.

        False if that would take more than ``reads`` refills in all, or more sweeps.
        """
        n, m = self.n, self.m
        key, where = np.full(n + m, np.inf), np.full(n + m, -1, np.int64)
        heap, touched = np.empty(n + m, np.int64), np.empty(n + m, np.int64)
        came_from, via, base_of = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(n)
        scanned = np.empty(m, np.int64)
        while True:
            sources = np.flatnonzero(self.col_of < 0)
            if not len(sources):
                return True
            at, waits = 0, 0
            while at < len(sources):
                at, waits = self.lap.augment(
                    *self.lists, *self.matching, sources, at, SLICE, self.pending, waits, self.waiting, self.counts,
                    key, heap, where, came_from, via, base_of, touched, scanned,
                )  # fmt: skip
            rows = self.pending[:waits].copy()
            self.waiting[rows] = 0
            sweeps -= 1
            if self.counts[self.lap.READS] + len(rows) > reads or (len(rows) and sweeps < 0):
                return False
            if len(rows):
                self.read(rows, True)


def sampled_spread(cost: FactorCost) -> float:
    """The standard deviation of some of the entries."""
    g = np.random.default_rng(0)
    rows, cols = (g.integers(size, size=16 * SAMPLE) for size in cost.shape)
    return float(cost.entries(rows, cols).std())


def norm_shift(cost: FactorCost, sign: float) -> np.ndarray:
    """Duals to start from: a multiple of the columns' squared norms, the one under which rows want most columns.

    ``min -a.b`` is ``min |a - b|^2 / 2`` up to terms of rows and columns, so ``v_j = -t |b_j|^2 / 2`` is close
    to tight for siblings (t near the ratio of norms); independent factors want less. A sample of rows tells.
    """
    n, m = cost.shape
    if cost.metric != "dot":
        return np.zeros(m)
    norms = np.zeros((2, max(n, m)))
    for a, b in cost.pairs:
        norms[0, :n] += a.double().square().sum(1).cpu().numpy()
        norms[1, :m] += b.double().square().sum(1).cpu().numpy()
    squares = norms[1, :m]
    if not squares.max() > 0:
        return np.zeros(m)
    scale = float(np.sqrt(norms[0, :n].mean() / squares.mean()))
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    best, most = np.zeros(m), -1
    for t in (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0):
        v = -0.5 * t * scale * squares
        first = cost.row_topk(v, 1, rows, sign)[0]
        distinct = len(np.unique(first))
        if distinct > most:
            best, most = v, distinct
    return best
