"""Bids in a matrix: row reduction and auctions, over lists and over whole rows, which are undone where they do not pay."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment.dense_matrix import restore
from fastmatch.assignment.dense_paths import DensePaths
from fastmatch.assignment.phases import SLICE
from fastmatch_kernels.lap.state import BIDS, READS, SLICES, new_best

__all__ = ["DenseBids"]

SCANNED = 1 << 28
"""Entries that bids over whole rows may scan in one call, which no signal interrupts."""


class DenseBids(DensePaths):
    """Bids of the free rows."""

    def bid(
        self, rows: np.ndarray, eps: float, bids: int, enough: int = 0, at_once: int = SLICE
    ) -> np.ndarray:
        """Run the auction among ``rows``, over whole rows once lists have to be read too often: see :meth:`Phases.bid`."""
        from fastmatch_kernels.lap.auction import auction
        from fastmatch_kernels.lap.bids import bid_rows

        plan, stack = self.schedule, self.state.stack
        # Duals may have risen since the rows' best columns were kept.
        aside = self.state._replace(
            seconds=np.empty(self.n), columns=np.empty(self.n, np.int64), best=new_best(0)
        )
        top = len(rows)
        stack[:top] = rows[::-1]
        while top > enough and bids > 0:
            part = min(bids, SLICE, at_once, 2 * self.n)
            if self.by_rows:
                top = bid_rows(self.costs, aside, top, eps, part, False)
            else:
                before = self.counts.copy()
                top, _ = auction(
                    self.matrix, self.sign, self.v, *self.arrays, stack, top, eps, part, tuple(self.refills), 0, self.counts
                )  # fmt: skip
                made, reads = (int(self.counts[k] - before[k]) for k in (BIDS, READS))
                self.made += made
                self.read_again += reads
                # Each row has to be read once for its first list.
                self.by_rows = self.read_again - self.n > plan.dear_bid_reads * self.made
            bids -= part
        if self.by_rows:
            self.note_costs()
        return stack[:top][::-1].copy()

    def reduce(self) -> None:
        """Run a pass of augmenting row reduction (Jonker and Volgenant 1987)."""
        rows = self.free_rows()
        if len(rows):
            self.bid(rows, 0.0, len(rows) + int(self.schedule.extra_steps * self.n))

    def reduce_on(self) -> bool:
        """Go on with row reduction while it matches many of the rows; return whether few are left."""
        rows, plan = self.free_rows(), self.schedule
        before = self.n
        while 0 < len(rows) < before and len(rows) <= plan.busy_above * before:
            before = len(rows)
            rows = self.bid(rows, 0.0, self.n // SLICES + 1)
        return self.free() <= plan.reduced_above * self.n

    def reduce_rows(self) -> None:
        """Run two passes of augmenting row reduction."""
        self.reduce()
        self.reduce()

    def reduce_surveyed(self) -> None:
        """Run row reduction by what the survey has found, if that matches half of the free rows."""
        from fastmatch_kernels.lap.match import reduce_surveyed

        rows = self.free_rows()
        self.state.stack[: len(rows)] = rows[::-1]
        reduce_surveyed(self.costs, self.state, len(rows))
        self.note_costs()

    def reduce_by_rows(self) -> None:
        """Run row reduction over whole rows until a path takes less time than a row's bids.

        In a rectangle most rows soon find a free column, and their lists would not be used again.
        """
        from fastmatch_kernels.lap.bids import bid_rows

        plan = self.schedule
        self.short_eps()
        self.by_rows = True
        rows = self.free_rows()
        settled, made = len(rows), 0
        step = max(1, min(self.n // SLICES + 1, SCANNED // self.m))
        while settled * plan.dear_bids > made:
            before = len(rows), int(self.counts[BIDS])
            self.state.stack[: len(rows)] = rows[::-1]
            bid_rows(self.costs, self.state, len(rows), 0.0, step, True)
            rows = self.free_rows()
            settled, made = before[0] - len(rows), int(self.counts[BIDS]) - before[1]
        self.list_best()

    def match_tight(self) -> None:
        """Free the rows whose match is not their best, and match free rows to free columns among their best."""
        from fastmatch_kernels.lap.lists import keep_tight

        keep_tight(self.matrix, self.v, *self.arrays)
        self.match_free()

    def refine(self) -> None:
        """Lower duals so that most matches become their row's best."""
        from fastmatch_kernels.lap.refine import refine

        refine(self.flat, self.m, self.sign, self.state.v, *self.arrays, self.counts)

    def bids(self, slow_above: float) -> bool:
        """Match free rows by row reduction and a short auction; return whether that paid: see :meth:`short_auctions`."""
        plan = self.schedule
        eps = self.short_eps()
        many = plan.auction_above * self.n
        # Lists are not used if half of the rows have ties for their best column, and not for few rows: reading a list
        # takes as long as scanning a row three times.
        self.by_rows = self.free() <= plan.listed_above * self.n or not self.distinct
        if self.by_rows:
            self.reduce()
            self.by_rows = self.free() <= many or not self.distinct
        if not self.by_rows:
            self.list_rows(self.free_rows())
            self.made, self.read_again = 0, self.free()
            self.reduce()
        before = self.free()
        if before <= many or self.reduce_on():
            self.reduce()
            return True
        if self.as_square and self.distinct:
            held = [(x, x.copy()) for x in (self.v, *self.matching)]
            if self.augment_by_rows(plan.ends_at_once * before, 1 / 16) == 0.0:
                return True
            restore(held)
            return self.short_auctions(eps, slow_above, before)
        self.reduce()
        return not self.as_square

    def short_eps(self) -> float:
        """Return the first eps of a short auction, and note whether most rows have a single best column.

        In a rectangle, bids have written to ``seconds``, and only the second answer is used.
        """
        from fastmatch_kernels.lap.duals import typical_gap

        eps = float(self.schedule.short_eps * typical_gap(self.state.least, self.state.seconds))
        self.distinct = 0.0 < eps < np.inf
        return eps

    def short_auctions(self, eps: float, slow_above: float, before: int) -> bool:
        """Run phases at a small eps, whose near-optimal duals make the searches short; undo them if they do not pay.

        Args:
            eps: the first phase's.
            slow_above: a phase ends if a bid per row leaves more than this fraction of the waiting rows waiting.
            before: free rows that it does not pay to leave.

        Returns:
            False if a phase ended with many rows waiting: a price war.
        """
        plan = self.schedule
        held = self.held()
        enough = int(plan.short_leaves * self.n)
        for phase in range(plan.short_phases):
            rows = self.free_rows()
            for _ in range(plan.short_bids):
                left = self.bid(rows, eps, self.n, enough)
                slow = (
                    len(left) > slow_above * len(rows) or len(left) > len(rows) - plan.least_settled * self.n
                )
                rows = left
                if slow or len(rows) <= enough:
                    break
            war = len(rows) > plan.war_above * self.n
            ended = self.held() if phase else []
            self.match_tight()
            self.reduce_rows()
            if ended and self.free() > plan.refined_above * self.n:
                reduced, free = self.held(), self.free()
                restore(ended)
                self.refine()
                self.match_tight()
                self.reduce_rows()
                if self.free() > free:
                    restore(reduced)
            left = self.free()
            useless = left > (plan.war_leaves * before if war and phase == 0 else before - 1)
            if useless and (war or phase in (0, plan.short_phases - 1)):
                restore(held)
                return False
            if war:
                return False
            if left <= plan.repeat_above * self.n:
                break
            eps *= plan.short_factor
        return True

    def scaled_auction_within(self, scans: float) -> bool:
        """Run the scaled auction unless it takes more work than so many scans of rows: then undo it and return False."""
        plan = self.schedule
        held = self.held()
        before = self.counts.copy()
        limit = scans * plan.scaling_share * self.m

        def is_over() -> bool:
            bids, reads = int(self.counts[BIDS] - before[BIDS]), int(self.counts[READS] - before[READS])
            return bids * plan.bid_entries + 3 * reads * self.m > limit

        self.scaled_auction(is_over)
        if is_over():
            restore(held)
            return False
        self.refine()
        self.match_tight()
        self.reduce_rows()
        return True
