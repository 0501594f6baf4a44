"""The phases that the list solvers share: reduction, auctions, augmenting paths, on one set of arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmatch.assignment.problem import Infeasible
from fastmatch.assignment.schedule import AuctionSchedule
from fastmatch_kernels.lap.state import FREE, READS, Lists, new_matching, new_paths, new_refills

__all__ = ["Phases", "deviation"]

SLICE = 1 << 19
"""Bids per call of the kernel, about 50 ms. Ctrl-C is handled between calls."""

PATH_SLICE = SLICE // 4
"""The same for paths, in popped columns and 1/32 of the columns of a row that is read."""


class Phases:
    """The arrays of one solve, as :mod:`fastmatch_kernels.lap.state` names them, and the steps on them.

    ``matrix`` is the cost if the kernels may read its rows, and None if :meth:`refill` reads them.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        lists: Lists,
        schedule: AuctionSchedule,
        sign: float,
        matrix: np.ndarray | None,
    ) -> None:
        self.n, self.m = shape
        self.lists, self.schedule, self.sign, self.matrix = lists, schedule, sign, matrix
        self.v = np.zeros(self.m)
        self.matching, self.refills = new_matching(*shape), new_refills(self.n)
        self.counts = np.zeros(4, np.int64)

    @property
    def arrays(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """The lists and the matching, as kernels take them."""
        return tuple(self.lists), tuple(self.matching)

    @property
    def row_of(self) -> np.ndarray:
        """The matching's row of each column."""
        return self.matching.row_of

    @property
    def col_of(self) -> np.ndarray:
        """The matching's column of each row."""
        return self.matching.col_of

    def spread(self) -> float:
        """Return the standard deviation of the listed costs, the unit of the scaled auction's eps."""
        raise NotImplementedError

    def refill(self, rows: np.ndarray, searching: bool) -> np.ndarray:
        """Read the lists of rows that wait; return the rows whose bids these settle. Not called with a matrix."""
        raise NotImplementedError

    def free_rows(self) -> np.ndarray:
        """Return the rows without a column."""
        return np.flatnonzero(self.col_of == FREE)

    def free(self) -> int:
        """Return the number of rows without a column."""
        return len(self.free_rows())

    def drop(self) -> None:
        """Forget the matching; the duals stay."""
        self.row_of.fill(-1)
        self.col_of.fill(FREE)

    def match_free(self) -> None:
        """Match free rows to free columns among their best; nothing else changes."""
        from fastmatch_kernels.lap.reduction import row_reduction

        row_reduction(self.matrix, self.v, *self.arrays)

    def match_tight(self) -> None:
        """Match rows to columns among their best, from an empty matching; the duals stay."""
        self.drop()
        self.match_free()

    def reduce_rows(self) -> None:
        """Run two passes of augmenting row reduction (Jonker and Volgenant 1987)."""
        for _ in range(2):
            free = self.free_rows()
            if len(free):
                self.bid(free, 0.0, 2 * len(free))

    def bid(
        self, rows: np.ndarray, eps: float, bids: int, enough: int = 0, at_once: int = SLICE
    ) -> np.ndarray:
        """Run the auction among ``rows``; return the rows that still wait for their turn, in order.

        It ends after ``bids`` bids, or when no more than ``enough`` rows are left: those would take more bids than all
        rows before them. Every ``at_once`` bids it checks for that.
        """
        from fastmatch_kernels.lap.auction import auction

        stack = np.zeros(self.n, np.int64)
        top = len(rows)
        stack[:top] = rows[::-1]
        while top > enough:
            waits = 0
            while top > enough and bids > 0:
                part = min(bids, SLICE, at_once)
                top, waits = auction(
                    self.matrix, self.sign, self.v, *self.arrays, stack, top, eps, part,
                    tuple(self.refills), waits, self.counts,
                )  # fmt: skip
                bids -= part
            if top > enough:  # rows that wait for a refill have not had their turn either
                return stack[:top][::-1].copy() if self.matrix is not None else self.free_rows()
            if waits <= enough:
                break
            rows = self.refill(self.refills.pending[:waits].copy(), False)
            top = len(rows)
            stack[:top] = rows[::-1]
        return stack[:top][::-1].copy()

    def scaled_auction(self, is_over: Callable[[], bool] = lambda: False) -> None:
        """Run the auction with eps-scaling: phases of falling eps that keep the duals and drop the matching.

        ``is_over`` is asked between bids and ends it.
        """
        plan = self.schedule
        self.drop()
        spread = self.spread()
        if not spread > 0:
            return
        everyone = rows = self.free_rows()
        eps = spread
        for _ in range(plan.raises):
            rows = self.bid(rows, eps, plan.scaled_bids * self.n)
            if not len(rows) or is_over():
                break
            eps *= plan.raise_factor
        while eps > plan.last_eps * spread * plan.lower_factor:
            eps /= plan.lower_factor
            self.drop()
            rows = everyone
            for _ in range(plan.phase_bids // plan.scaled_bids):
                rows = self.bid(rows, eps, plan.scaled_bids * self.n)
                if not len(rows) or is_over():
                    break
            if is_over():
                break

    def infeasible(self, row: int) -> Infeasible:
        """Return the error that a row, by its number in the problem as solved, has no path."""
        return Infeasible(
            f"cost: no assignment avoids the forbidden entries (row {row} of the problem as solved)"
        )

    def augment(self, reads: float = np.inf, sweeps: float = np.inf) -> bool:
        """Match every free row by a shortest augmenting path, in sweeps between which waiting rows are refilled.

        Args:
            reads: rows that may have been read again, over the whole solve.
            sweeps: sweeps that may end with rows waiting.

        Returns:
            False if more would be needed.

        Raises:
            Infeasible: forbidden entries leave no assignment.
        """
        from fastmatch_kernels.lap.augment import augment

        paths = tuple(new_paths(self.n, self.m))
        while True:
            sources = self.free_rows()
            at, waits = 0, 0
            while at < len(sources):
                at, waits = augment(
                    self.matrix, self.sign, self.v, *self.arrays, sources, at, PATH_SLICE,
                    tuple(self.refills), waits, paths, self.counts,
                )  # fmt: skip
                if at < 0:
                    raise self.infeasible(-1 - at)
                if at < len(sources) and self.counts[READS] > reads:
                    return False
            if not waits:
                return True
            rows = self.refills.pending[:waits].copy()
            self.refills.waiting[rows] = 0
            sweeps -= 1
            if self.counts[READS] + waits > reads or sweeps < 0:
                return False
            self.refill(rows, True)


def deviation(values: np.ndarray) -> float:
    """Return the standard deviation of finite float64 values, whose squares may overflow."""
    largest = float(np.abs(values).max(initial=0.0))
    return largest * float((values / largest).std()) if largest > 0 else 0.0
