"""The dense solver: shortlists, an auction where it pays, shortest augmenting paths, a certificate.

See docs/assignment.md for why a lazy shortlist is exact and what each step costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmatch.assignment._compile import prepared
from fastmatch_kernels._numba.parallel import over_rows

__all__ = ["Dense", "Infeasible", "check_entries", "solve_dense"]

SLICE = 1 << 19
"""Units of work (bids, columns popped, 1/32 columns read) between returns to Python, where Ctrl-C is heard: some
50 ms."""

EASY = 0.2
"""Share of rows left free by column and row reduction up to which shortest paths need no auction before them."""

TIED = 0.5
"""Share of rows left free by column reduction above which columns may share their minima; random entries leave 1/e."""

PATIENCE = 16
"""Rows that may turn out to share no minimum before the search for such is given up."""

UNEQUAL = 16
"""Constant rows and columns are cut out where their numbers differ by more than one in so many of the live rows."""

GAPS, STEP = 0.15, 0.2
"""The first short auction's eps, in mean differences between a row's least two, and the factor to the next one's."""

HARD, PHASES = 0.1, 6
"""Share of rows left free by a short auction and row reduction above which another one pays; such auctions at most."""

LEFT_OVER = 1024
"""The short auction ends when one row in so many is still free: a path finds its column sooner."""

WAR = 32
"""A short auction that is stopped with more than one row in so many still free was a price war: eps is too small."""

READS_BEFORE_AUCTION = 32
"""Whole-matrix reads that shortest paths may cost before the auction is called in again."""

BIDS_BEFORE_RAISE = 64
"""Bids a row in a short auction, or in the first phase of the scaled one before its eps is raised: a price war means
that eps is too small."""

RAISE, LOWER, LAST = 5.0, 10.0, 0.011
"""Factors between auction phases, and where they end, in standard deviations of the shortlisted costs."""


class Infeasible(ValueError):
    """Forbidden entries leave no assignment."""


@dataclass
class Dense:
    """A minimisation: ``sign * matrix``, (n, m) with n <= m, rows contiguous, float32 or float64."""

    matrix: np.ndarray
    sign: float


def check_entries(matrix: np.ndarray, maximize: bool) -> None:
    """ValueError for NaN and for infinities that are no forbidden entries."""
    step = max(1, (1 << 22) // max(matrix.shape[1], 1))
    for lo in range(0, matrix.shape[0], step):
        block = matrix[lo : lo + step]
        if np.isnan(block).any():
            raise ValueError("cost: holds NaN")
        if (np.isposinf(block) if maximize else np.isneginf(block)).any():
            raise ValueError(
                f"cost: holds {'+' if maximize else '-'}inf; only {'-' if maximize else '+'}inf may forbid an entry"
            )


def solve_dense(
    problem: Dense, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Solves a minimisation exactly.

    Args:
        problem: the costs; +inf forbids an entry, NaN and -inf have been ruled out.
        start: (m,) column duals to start from; only for square problems.

    Returns:
        (col_of (n,), u (n,), v (m,), counts (4,)).

    Raises:
        Infeasible: forbidden entries leave no assignment.

    Memory: 24 (index, cost) pairs a row, and a few vectors, beside the matrix.
    """
    return _Solve(problem, start).run()


class _Solve:
    """The arrays of one solve (named as in fastmatch_kernels.lap.dense) and the steps on them."""

    def __init__(self, problem: Dense, start: np.ndarray | None) -> None:
        from fastmatch_kernels.lap import dense as lap
        from fastmatch_kernels.lap import passes as lap_rows

        self.lap, self.passes = lap, lap_rows
        self.cost, self.sign = problem.matrix, problem.sign
        n, m = self.n, self.m = self.cost.shape
        self.counts = np.zeros(4, np.int64)
        # Empty lists: a row that is matched without one is read when a search first wants more than its bound.
        self.near = np.zeros((n, lap_rows.CAPACITY), np.int32)
        self.near_cost = np.full((n, lap_rows.CAPACITY), np.inf, self.cost.dtype)
        self.bound = np.full(n, -np.inf)
        self.row_of = np.full(m, -1, np.intp)
        self.col_of = np.full(n, -1, np.intp)
        self.cost_of = np.zeros(n)
        self.row_at = np.full(m, -1, np.intp)
        self.at_minima = False  # whether the first duals are the columns' minima
        self.finite = True
        self.v = self._first_duals(start)

    def _first_duals(self, start: np.ndarray | None) -> np.ndarray:
        """Column minima (square; zero where the problem is not, since unmatched columns keep the largest dual)."""
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        sums: list[float] = []

        def read(lo: int, hi: int) -> None:
            least, row_at = np.full(self.m, np.inf), np.full(self.m, -1, np.intp)
            sums.append(self.passes.column_minima(self.cost, self.sign, lo, hi, least, row_at))
            parts.append((least, row_at))

        over_rows(self.n, self.cost.size, read)
        self.counts[self.lap.READS] += self.n
        # A sum is finite only if every entry is, short of overflow: only otherwise is there more to find out.
        self.finite = bool(np.isfinite(sums).all())
        if not self.finite:
            check_entries(self.cost, self.sign < 0)
        if self.n != self.m:
            return np.zeros(self.m)
        if start is not None and np.isfinite(start).all():
            return np.array(start, dtype=np.float64)
        least, row_at = parts[0]
        for other, at in parts[1:]:
            row_at = np.where(other < least, at, row_at)
            least = np.minimum(least, other)
        self.row_at = row_at
        self.at_minima = True
        self.bound.fill(0.0)  # of c - v, under these duals and all lower ones
        return np.where(np.isfinite(least), least, 0.0)

    @property
    def lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.near, self.near_cost, self.bound

    @property
    def matching(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.row_of, self.col_of, self.cost_of

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        can_bid = self.n == self.m > 1 and self.finite
        rows, cols = self.constant() if can_bid else (np.zeros(0, np.intp),) * 2
        if len(rows) and len(cols):
            if abs(len(rows) - len(cols)) * UNEQUAL > self.n - len(rows):
                self.solve_live(rows, cols)
                return self.col_of, self.row_duals(), self.v, self.counts
            count = min(len(rows), len(cols))
            rows, cols = rows[:count], cols[:count]
        else:
            rows = cols = np.zeros(0, np.intp)
        self.col_of[rows] = self.lap.ASIDE
        self.v[cols] = -np.inf
        self.lap.column_reduction(self.cost, self.sign, self.v, self.row_at, *self.matching)
        if self.at_minima and self.free() > TIED * self.n:
            self.lap.tie_reduction(self.cost, self.sign, self.v, PATIENCE, *self.matching, self.counts)
            if can_bid and self.free() > TIED * self.n:
                # A few rows have the minima of most columns: such duals take longer to undo than none.
                self.v[self.v > -np.inf] = 0.0
                self.drop()
        self.list_rows(self.free_rows())
        self.match_free()
        calm = True
        if can_bid and self.free() > EASY * self.n:
            calm = self.short_auctions()
        else:
            self.reduce_rows()
        if not calm or not self.augment(READS_BEFORE_AUCTION * self.n if can_bid else None):
            self.scaled_auction()
            self.match_tight()
            self.reduce_rows()
            self.augment(None)
        if len(rows):
            self.bring_back(rows, cols)
        return self.col_of, self.row_duals(), self.v, self.counts

    def row_duals(self) -> np.ndarray:
        """The least c - v of every row."""
        u = np.zeros(self.n)
        read: list[int] = []
        over_rows(
            self.n,
            self.cost.size,
            lambda lo, hi: read.append(
                self.lap.row_duals(self.cost, self.sign, lo, hi, self.v, *self.lists, u)
            ),
        )
        self.counts[self.lap.READS] += sum(read)
        return u

    def list_rows(self, rows: np.ndarray) -> None:
        """The shortlists of some rows, read once, on all cores."""
        self.counts[self.lap.READS] += len(rows)

        def read(lo: int, hi: int) -> None:
            self.passes.shortlists(self.cost, self.sign, rows[lo:hi], self.v, *self.lists)

        over_rows(len(rows), len(rows) * self.m, read)

    def free_rows(self) -> np.ndarray:
        return np.flatnonzero(self.col_of == self.lap.FREE)

    def unlisted_rows(self) -> np.ndarray:
        return np.flatnonzero((self.near_cost[:, 0] == np.inf) & (self.col_of != self.lap.ASIDE))

    def constant(self) -> tuple[np.ndarray, np.ndarray]:
        """The constant rows and the constant columns (dead units).

        If there are both, all have one value, since each row meets each column. Left in, they tie with everything:
        every list fills with equal columns, and the auction creeps by eps.
        """
        some = np.linspace(0, self.n - 1, 8).astype(np.intp)
        cols = np.flatnonzero((self.cost[some] == self.cost[some[0]]).all(axis=0))
        rows = np.flatnonzero((self.cost[:, some] == self.cost[:, :1]).all(axis=1)) if len(cols) else cols
        same = np.ones(len(rows), np.bool_)
        self.passes.constant_rows(self.cost, rows, same)
        rows = rows[same]
        if not len(rows) or not len(cols):
            return rows, cols[:0]
        # A constant row has every constant column's value: only the others have to be asked.
        others = np.delete(np.arange(self.n), rows)
        same, values = np.ones(len(cols), np.bool_), self.cost[rows[0], cols]
        over_rows(
            len(others),
            len(others) * len(cols),
            lambda lo, hi: self.passes.constant_columns(self.cost, others[lo:hi], cols, values, same),
        )
        return rows, cols[same]

    def solve_live(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Solves what is left without constant rows and columns, and completes that.

        What is left is not square; its unmatched columns (or rows) go to constant rows (or columns), which are
        indifferent. With value c, column duals t there, and row duals c - t, all of that is tight. Entries of
        live rows in constant columns, or of constant rows in live columns, may be better than what was found:
        such rows are freed, and shortest paths finish exactly.
        """
        live_rows, live_cols = np.delete(np.arange(self.n), rows), np.delete(np.arange(self.m), cols)
        value = self.sign * float(self.cost[rows[0], cols[0]])
        inner = self.cost[np.ix_(live_rows, live_cols)]
        tall = len(live_rows) > len(live_cols)
        found, u, v, counts = _Solve(
            Dense(np.ascontiguousarray(inner.T) if tall else inner, self.sign), None
        ).run()
        self.counts += counts
        if tall:
            u, v = v, u
            reach = float(u.max())
            top = value - reach
            at_rows, at_cols = found, np.arange(len(found))
        else:
            top = float(v.max(initial=-np.inf)) if len(v) else 0.0
            reach = value - top
            at_rows, at_cols = np.arange(len(found)), found
        kept = (u[at_rows] <= reach) & (v[at_cols] <= top)
        self.v[live_cols], self.v[cols] = np.minimum(v, top), top
        self.bound[live_rows], self.bound[rows] = np.minimum(u, reach), reach
        self.take(live_rows[at_rows[kept]], live_cols[at_cols[kept]])
        # What nobody inside took has the largest dual there: it is as good as a constant one.
        if tall:
            spare = np.setdiff1d(live_rows, live_rows[at_rows])
            self.take(np.concatenate([rows, spare]), cols)
        else:
            spare = np.setdiff1d(live_cols, live_cols[at_cols])
            self.take(rows, np.concatenate([cols, spare]))
        self.augment(None)

    def take(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Matches rows to columns, one by one."""
        self.col_of[rows], self.row_of[cols] = cols, rows
        self.cost_of[rows] = self.sign * self.cost[rows, cols].astype(np.float64)

    def bring_back(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Returns constant rows and columns to a problem that was solved without them.

        With value c and the largest dual t of the other columns, duals t for the columns are feasible for the
        constant rows and tight between the two. Rows that find a constant column (at c - t) better than
        what they have are freed; shortest paths finish exactly.
        """
        value = self.sign * float(self.cost[rows[0], cols[0]])
        others = self.v[self.v > -np.inf]
        top = float(others.max()) if len(others) else 0.0
        self.v[cols] = top
        # No list knows these columns: nothing outside a list is now less than what they offer.
        np.minimum(self.bound, value - top, out=self.bound)
        self.near_cost[rows] = np.inf
        self.bound[rows] = value - top
        matched = np.flatnonzero(self.col_of >= 0)
        columns = self.col_of[matched]
        worse = self.cost_of[matched] - self.v[columns] > value - top
        self.row_of[columns[worse]] = -1
        self.col_of[matched[worse]] = self.lap.FREE
        self.col_of[rows], self.row_of[cols], self.cost_of[rows] = cols, rows, value
        self.augment(None)

    def free(self) -> int:
        return len(self.free_rows())

    def drop(self) -> None:
        """Forgets the matching; the duals stay."""
        self.row_of.fill(-1)
        self.col_of[self.col_of != self.lap.ASIDE] = self.lap.FREE

    def match_tight(self) -> None:
        """Matches rows to columns among their best, from nothing; the duals stay."""
        self.drop()
        self.match_free()

    def match_free(self) -> None:
        """Matches free rows to free columns among their best; nothing else moves."""
        self.lap.row_reduction(self.v, *self.lists, *self.matching)

    def reduce_rows(self) -> None:
        """Two passes of augmenting row reduction (Jonker and Volgenant 1987)."""
        for _ in range(2):
            free = self.free_rows()
            if len(free):
                self.bid(self.stack(free), len(free), 0.0, 2 * len(free))

    def stack(self, rows: np.ndarray) -> np.ndarray:
        stack = np.zeros(self.n, np.intp)
        stack[: len(rows)] = rows[::-1]
        return stack

    def bid(self, stack: np.ndarray, top: int, eps: float, bids: int) -> int:
        """The auction in slices, until the stack is empty or ``bids`` are spent; the rows still on it."""
        while top > 0 and bids > 0:
            part = min(bids, SLICE)
            top = self.lap.auction(
                self.cost, self.sign, self.v, *self.lists, *self.matching, stack, top, eps, part, self.counts
            )
            bids -= part
        return top

    def spread(self) -> float:
        """How far listed costs lie apart, the unit of the auctions' eps."""
        listed = self.near_cost[np.isfinite(self.near_cost)].astype(np.float64)
        largest = np.abs(listed).max(initial=0.0)
        return float((listed / largest).std() * largest) if largest > 0 else 0.0  # squares of 1e200 overflow

    def refresh(self) -> float:
        """The mean difference between a row's best two; reads the rows whose lists no longer tell them, if these are many."""
        stale = np.zeros(self.n, np.bool_)
        gap = self.lap.best_two(self.v, *self.lists, self.col_of, stale)
        if stale.sum() > HARD * self.n:
            self.list_rows(np.flatnonzero(stale))
        return float(gap)

    def short_auctions(self) -> bool:
        """Phases at small eps: near-optimal duals make the searches after them short. False for a price war."""
        self.list_rows(self.unlisted_rows())
        eps = GAPS * self.refresh()
        self.drop()
        for _ in range(PHASES):
            if not 0 < eps < np.inf:
                break
            free = self.free_rows()
            stack, top = self.stack(free), len(free)
            for _ in range(BIDS_BEFORE_RAISE):
                top = self.bid(stack, top, eps, self.n)
                if top <= self.n // LEFT_OVER:
                    break
            self.refresh()
            self.match_tight()
            if top > self.n // WAR:
                return False
            self.reduce_rows()
            if self.free() <= HARD * self.n:
                break
            eps *= STEP
        return True

    def scaled_auction(self) -> None:
        """eps-scaling: phases of falling eps that keep the duals and drop the matching."""
        self.drop()
        self.list_rows(self.unlisted_rows())
        everyone = self.free_rows()
        spread = self.spread()
        if not spread > 0:
            return
        eps = spread
        stack, top = self.stack(everyone), len(everyone)
        for _ in range(8):
            top = self.bid(stack, top, eps, BIDS_BEFORE_RAISE * self.n)
            if top == 0:
                break
            eps *= RAISE
        while eps > LAST * spread * LOWER:
            eps /= LOWER
            self.drop()
            # A phase that does not end in so many bids has met the limits of float64; what it has is a start.
            self.bid(self.stack(everyone), len(everyone), eps, 1000 * self.n)

    def augment(self, reads: int | None) -> bool:
        """Shortest augmenting paths for every free row; False if ``reads`` rows were read before the end."""
        n, m = self.n, self.m
        key, where = np.full(n + m, np.inf), np.full(n + m, -1, np.intp)
        heap, touched = np.empty(n + m, np.intp), np.empty(2 * (n + m), np.intp)
        came_from, scanned, base_of = np.empty(m, np.intp), np.empty(m, np.intp), np.empty(n)
        read_in = np.full(n, -1, np.intp)
        before = int(self.counts[self.lap.READS])
        row = 0
        while row < n:
            row = self.lap.augment(
                self.cost, self.sign, self.v, *self.lists, *self.matching, row, SLICE // 4, self.counts,
                key, heap, where, came_from, base_of, touched, scanned, read_in,
            )  # fmt: skip
            if row < 0:
                raise Infeasible(
                    f"cost: no assignment avoids the forbidden entries (row {-1 - row} of the problem as solved)"
                )
            if reads is not None and row < n and int(self.counts[self.lap.READS]) - before > reads:
                return False
        return True


def compile_kernels(dtype: np.dtype) -> None:
    """Makes the kernels for one dtype ready, with a line if they have to be compiled."""

    def run_tiny() -> None:
        tiny = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 7.0], [3.0, 6.0, 9.5]], dtype=dtype)
        solve = _Solve(Dense(tiny, 1.0), None)
        solve.run()
        solve.scaled_auction()

    prepared(f"the assignment kernels for {dtype}", ("dense", dtype.char), run_tiny)
