"""The solver for costs whose rows are read in batches: candidate lists that are refilled between rounds.

The steps are those of :mod:`fastmatch.assignment.dense_shortlists`. The difference: reading one row costs nearly as much as
reading a thousand (a product of matrices), so the kernels pass over the rows that need a refill, and all of them are
read together. docs/design/assignment.md explains why that is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_integer, check_type
from fastmatch.assignment.cost import Cost, SoftCost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost
from fastmatch.assignment.phases import SLICE, Phases, deviation
from fastmatch.assignment.problem import LapProblem, LapSolution
from fastmatch.assignment.schedule import ListSchedule
from fastmatch_kernels.lap.state import BIDS, READS, Lists

__all__ = ["CandidateLists"]

VECTOR = 8
"""Lists are padded to whole vectors of so many entries."""

TIED = 1e-12
"""Difference of two entries, relative to one, that may be rounding."""

HELD = 1 << 27
"""Entries of a factor cost up to which its matrix is computed (1 GB in float64) if lists do not suit it."""

REFILL_ENTRIES = 1 << 24
"""Entries of lists that are refilled at once at most: 200 MB."""

SAMPLED_ENTRIES = 1 << 12
"""Entries from which the spread of the costs is estimated."""


@dataclass(frozen=True)
class CandidateLists:
    """Solve a cost of which no matrix is stored on the host: the choice for large factor costs and matrices on a GPU.

    Lists do not suit every matrix. It gives a :class:`DeviceCost` up if entries are not finite, if many lists end among equal
    entries, or if paths need too many refills; :func:`fastmatch.assignment.solve` then copies the matrix to the host
    and uses :class:`DenseShortlists`.

    Example:
        >>> cost = fm.assignment.FactorCost([(torch.randn(300, 8), torch.randn(300, 8))])
        >>> fm.solve(cost, maximize=True, solver=fm.assignment.CandidateLists()).is_certified
        True

    Args:
        length: entries of a row's first list. Longer than those of :class:`DenseShortlists`, because a longer list costs
            little in addition to the product.
        batch_rows: rows that are read at once at most. Ctrl-C is heard between batches.
        schedule: when its phases run.

    Raises:
        TypeError: ``schedule`` is not a :class:`ListSchedule`.
        ValueError: a number that is out of range.

    Cost: one batched read of all rows for the first lists, one for the row duals, and those of the refills
    (``stats["reads"]`` counts rows). Memory: ``length`` (index, cost) pairs per row; refills may double a row's.
    """

    length: int = 48
    batch_rows: int = 4096
    schedule: ListSchedule = field(default_factory=ListSchedule)

    def __post_init__(self) -> None:
        check_integer("length", self.length, 1)
        check_integer("batch_rows", self.batch_rows, 1)
        check_type("schedule", self.schedule, ListSchedule)

    def solve(self, problem: LapProblem) -> LapSolution | None:
        """Solve the problem: see :meth:`Solver.solve`. A :class:`DeviceCost` and a smaller :class:`FactorCost` can be given up."""
        if isinstance(problem.cost, DenseCost):
            raise ValueError(
                "cost: CandidateLists takes a FactorCost, a floating-point torch tensor or another cost that is read in batches; "
                "matrices on the host are solved by DenseShortlists, SmallDense or LapJV"
            )
        if not isinstance(problem.cost, DeviceCost):
            can_hold = isinstance(problem.cost, FactorCost) and math.prod(problem.shape) <= HELD
            return _ListPhases(problem, self).run(
                self.schedule.given_up * problem.shape[0] if can_hold else np.inf
            )
        return _ListPhases(problem, self).attempt() if problem.cost.is_finite() else None


class _ListPhases(Phases):
    """The phases on lists that :meth:`refill` reads."""

    schedule: ListSchedule

    def __init__(self, problem: LapProblem, solver: CandidateLists) -> None:
        self.cost: Cost = problem.cost
        self.batch = solver.batch_rows
        self.k = min(solver.length, problem.shape[1])
        super().__init__(
            problem.shape, empty_lists(problem.shape[0], self.k), solver.schedule, problem.sign, None
        )
        self.listed = np.empty(self.n, np.int64)  # entries of a row's list that are in use
        self.used = 0
        self.version = np.full(self.n, -1, np.int64)
        self.is_square = self.n == self.m > 1
        if self.is_square:
            start = problem.finite_start
            self.v = self.first_duals() if start is None else start

    def first_duals(self) -> np.ndarray:
        return self.cost.first_duals(self.sign) if isinstance(self.cost, SoftCost) else np.zeros(self.m)

    def run(self, reads: float) -> LapSolution | None:
        """Solve, or return None once more than ``reads`` rows have been read again."""
        plan = self.schedule
        self.fill()
        if reads < np.inf and self.tied() > plan.copied_above:
            return None
        self.begin()
        soft = self.is_square and isinstance(self.cost, SoftCost) and self.cost.has_soft_duals
        if soft and (self.free() > plan.restart_above * self.n or not self.augment(plan.refills * self.n)):
            self.restart()
        if self.is_square and self.free() > plan.scaling_above * self.n:
            self.scaled_auction(lambda: self.counts[READS] > reads)
            self.match_tight()
            self.reduce_rows()
        return self.result() if self.augment(reads) else None

    def attempt(self) -> LapSolution | None:
        """Solve, or return None if lists do not suit the cost."""
        plan = self.schedule
        self.fill()
        last = self.lists.start + self.k - 1
        least_outside = self.lists.costs[last] - self.v[self.lists.cols[last]]
        if (least_outside == self.lists.bound).mean() > plan.tied_above:
            return None
        self.begin()
        return self.result() if self.augment(plan.refills * self.n, plan.sweeps) else None

    def tied(self) -> float:
        """Return the fraction of rows whose two best entries are equal up to rounding, as those of copied columns are."""
        if self.k < 2:
            return 0.0
        shape = (self.n, padded(self.k))
        cols, costs = (
            self.lists.cols[: self.used].reshape(shape),
            self.lists.costs[: self.used].reshape(shape),
        )
        best = np.partition(costs - self.v[cols], 1, axis=1)[:, :2]
        return float((best[:, 1] - best[:, 0] <= TIED * np.abs(costs[:, 0])).mean())

    def result(self) -> LapSolution:
        return LapSolution(self.col_of, self.cost.row_min(self.v, self.sign), self.v, self.counts)

    def begin(self) -> None:
        """Go from first lists to a matching that leaves little to the paths."""
        self.match_tight()
        self.reduce_rows()
        if self.is_square and self.free() > self.schedule.auction_above * self.n:
            self.short_auction()
            self.fill()  # one product, after which paths rarely wait for a row
            self.match_tight()
            self.reduce_rows()

    def restart(self) -> None:
        """Begin again from Sinkhorn's duals. Their cost is known beforehand, and they leave the paths little to do."""
        cost, plan = self.cost, self.schedule
        assert isinstance(cost, SoftCost)
        spread = sampled_spread(cost)
        if not spread > 0:
            return
        steps = np.geomspace(plan.first_temperature, plan.last_temperature, plan.temperatures)
        duals = cost.sinkhorn_duals(self.first_duals(), (spread * steps).tolist(), self.sign, plan.relaxation)
        if np.isfinite(duals).all():
            self.v = duals
            self.fill()
            self.match_tight()
            self.reduce_rows()

    def fill(self) -> None:
        """Read first lists of all rows at the present duals."""
        room = padded(self.k)
        start, length, _, _, _ = self.lists
        start[:], length[:] = np.arange(self.n) * room, room
        self.listed.fill(self.k)
        self.used = self.n * room
        everyone = np.arange(self.n)
        for lo in range(0, self.n, self.batch):
            self.write(everyone[lo : lo + self.batch], self.k)

    def write(self, rows: np.ndarray, k: int) -> None:
        """Read the lists of some rows into their places, which hold k entries."""
        items, costs, self.lists.bound[rows] = self.cost.row_topk(self.v, k, rows, self.sign)
        items = np.maximum(items, 0)  # kernels do not check; a missing entry costs inf
        room = padded(k)
        start = self.lists.start[rows]
        if (np.diff(start) == room).all():  # one stretch of the pool
            block = slice(int(start[0]), int(start[-1]) + room)
            cols, values = (x[block].reshape(len(rows), room) for x in (self.lists.cols, self.lists.costs))
            cols[:, :k], values[:, :k] = items, costs
            cols[:, k:], values[:, k:] = 0, np.inf
            return
        place = start[:, None] + np.arange(room)
        self.lists.cols[place[:, :k]], self.lists.costs[place[:, :k]] = items, costs
        self.lists.cols[place[:, k:]], self.lists.costs[place[:, k:]] = 0, np.inf

    def refill(self, rows: np.ndarray, searching: bool) -> np.ndarray:
        """Read rows again; return those whose fresh lists settle a bid. Ties leave the others to the paths.

        A row that a search waits for gets a list of twice the length if a fresh one of the same length would tell nothing new.
        """
        self.counts[READS] += len(rows)
        listed = self.listed[rows]
        version = int(self.counts[BIDS]) + self.n - self.free()
        longer = self.version[rows] == version
        if searching:
            longer |= self.live(rows) * 2 > listed
        self.version[rows] = version
        wanted = np.minimum(np.where(longer, 2 * listed, listed), self.m)
        for k in np.unique(wanted).tolist():
            group = np.sort(rows[wanted == k])
            step = max(1, min(self.batch, REFILL_ENTRIES // k))
            for lo in range(0, len(group), step):
                part = group[lo : lo + step]
                self.move(part[self.listed[part] != k], k)
                self.write(part, k)
        return rows if searching else rows[self.live(rows) >= min(2, self.m)]

    def move(self, rows: np.ndarray, k: int) -> None:
        """Give some rows places for k entries at the end of the pool."""
        if not len(rows):
            return
        room = padded(k)
        self.reserve(len(rows) * room)
        self.lists.start[rows] = self.used + np.arange(len(rows)) * room
        self.lists.length[rows], self.listed[rows] = room, k
        self.used += len(rows) * room

    def live(self, rows: np.ndarray) -> np.ndarray:
        """Return how many entries of each row's list are still known to be its smallest."""
        start, _, cols, costs, bound = self.lists
        out = np.empty(len(rows), np.int64)
        for k in np.unique(self.listed[rows]).tolist():
            group = np.flatnonzero(self.listed[rows] == k)
            for lo in range(0, len(group), self.batch):
                at = group[lo : lo + self.batch]
                place = start[rows[at]][:, None] + np.arange(k)
                values = costs[place] - self.v[cols[place]]
                out[at] = (values <= bound[rows[at]][:, None]).sum(axis=1)
        return out

    def reserve(self, extra: int) -> None:
        """Make room for ``extra`` entries: drop abandoned lists, then enlarge the pool."""
        start, length, old_cols, old_costs, bound = self.lists
        if self.used + extra <= len(old_cols):
            return
        live = int(length.sum())
        capacity = max(len(old_cols), live + extra + live // 4)
        cols, costs = np.empty(capacity, np.int32), np.empty(capacity)
        at = 0
        for i in range(self.n):
            old, size = int(start[i]), int(length[i])
            cols[at : at + size], costs[at : at + size] = (
                old_cols[old : old + size],
                old_costs[old : old + size],
            )
            start[i] = at
            at += size
        self.lists, self.used = Lists(start, length, cols, costs, bound), at

    def spread(self) -> float:
        """Return the standard deviation of the better half of the listed costs."""
        listed = self.lists.costs[: self.n * padded(self.k)].reshape(self.n, padded(self.k))
        return deviation(listed[:, : max(1, self.k // 2)])

    def short_auction(self) -> None:
        """Run one phase at a small eps: near-optimal duals make the searches after it short."""
        plan = self.schedule
        eps = plan.short_eps * self.spread()
        if eps > 0:
            self.drop()
            everyone = np.arange(self.n)
            enough = int(plan.short_leaves * self.n)
            self.bid(everyone, eps, plan.short_bids * self.n, enough, self.n if enough else SLICE)


def empty_lists(n: int, k: int) -> Lists:
    """Return a pool that holds a first list of k entries per row."""
    room = padded(k)
    return Lists(
        np.arange(n, dtype=np.int64) * room,
        np.full(n, room, np.int64),
        np.zeros(n * room, np.int32),
        np.full(n * room, np.inf),
        np.empty(n),
    )


def padded(k: int) -> int:
    """Return the places of the pool that a list of k entries takes."""
    return -(-k // VECTOR) * VECTOR


def sampled_spread(cost: Cost) -> float:
    """Return the standard deviation of a sample of the entries."""
    g = np.random.default_rng(0)
    rows, cols = (g.integers(size, size=SAMPLED_ENTRIES) for size in cost.shape)
    return deviation(cost.entries(rows, cols))
