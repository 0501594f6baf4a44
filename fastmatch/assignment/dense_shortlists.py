"""The solver for matrices: candidate lists that are read once and refilled on demand, an auction if it pays, paths.

docs/design/assignment.md says why lists that are refilled on demand are exact, and what each step costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_type
from fastmatch.assignment._compile import prepared
from fastmatch.assignment.phases import Phases
from fastmatch.assignment.problem import LapProblem, LapSolution, check_entries
from fastmatch.assignment.reading import for_kernels
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.lap.state import ASIDE, FREE, READS, matrix_lists

__all__ = ["DenseShortlists"]


@dataclass(frozen=True)
class DenseShortlists:
    """Solve a matrix with a short candidate list per row: the choice beyond 2^20 entries.

    It takes matrices on the host or on a GPU, which are copied to the host, and factor costs, whose matrix is computed in
    float64. +inf (-inf for a maximisation) forbids an entry.

    Example:
        >>> fm.solve(np.random.rand(300, 300), solver=fm.assignment.DenseShortlists()).is_certified
        True

    Args:
        schedule: when its phases run.

    Raises:
        TypeError: ``schedule`` is not a :class:`DenseSchedule`.

    Cost: one read of the matrix if most rows have a column's minimum, as for copies with noise, two for independent
    entries, plus the rows that the auction or the paths read again (``stats["reads"]`` counts rows). Memory: 24 (index, cost)
    pairs per row in addition to the matrix.
    """

    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        check_type("schedule", self.schedule, DenseSchedule)

    def solve(self, problem: LapProblem) -> LapSolution:
        """Solve the problem: see :meth:`Solver.solve`."""
        matrix = for_kernels(problem.matrix(self, computed=True))
        compile_kernels(matrix.dtype)
        return _DensePhases(matrix, problem.sign, self.schedule, problem.finite_start).run()


class _DensePhases(Phases):
    """The phases of a matrix on the host."""

    schedule: DenseSchedule
    matrix: np.ndarray

    def __init__(
        self, matrix: np.ndarray, sign: float, schedule: DenseSchedule, start: np.ndarray | None
    ) -> None:
        # Lists are empty at first: a row that is matched without one is read when a search first wants more than its bound.
        super().__init__(
            (matrix.shape[0], matrix.shape[1]),
            matrix_lists(len(matrix), matrix.dtype),
            schedule,
            sign,
            matrix,
        )
        self.row_at = np.full(self.m, -1, np.int64)
        self.at_minima = False  # whether the first duals are the columns' minima
        self.finite = True
        self.v = self.first_duals(start)

    @property
    def bound(self) -> np.ndarray:
        return self.lists.bound

    def first_duals(self, start: np.ndarray | None) -> np.ndarray:
        """Return the first column duals: ``start``, or the column minima.

        Zeros if the problem is not square, because unmatched columns must keep the largest dual.
        """
        from fastmatch_kernels.lap.rows import column_minima

        parts: list[tuple[np.ndarray, np.ndarray]] = []
        sums: list[float] = []

        def read(lo: int, hi: int) -> None:
            least, row_at = np.full(self.m, np.inf), np.full(self.m, -1, np.intp)
            sums.append(column_minima(self.matrix, self.sign, lo, hi, least, row_at))
            parts.append((least, row_at))

        over_rows(self.n, self.matrix.size, read)
        self.counts[READS] += self.n
        # A sum is finite only if every entry is. If it is not, entries are checked one by one: it may be an overflow.
        self.finite = bool(np.isfinite(sums).all())
        if not self.finite:
            check_entries(self.matrix, self.sign)
        if self.n != self.m:
            return np.zeros(self.m)
        if start is not None:
            return start
        least, row_at = parts[0]
        for other, at in parts[1:]:
            row_at = np.where(other < least, at, row_at)
            least = np.minimum(least, other)
        self.row_at = row_at
        self.at_minima = True
        self.bound.fill(0.0)  # of c - v, under these duals and all lower ones
        return np.where(np.isfinite(least), least, 0.0)

    def run(self) -> LapSolution:
        from fastmatch_kernels.lap.reduction import column_reduction, tie_reduction

        plan = self.schedule
        can_bid = self.n == self.m > 1 and self.finite
        rows, cols = self.constant() if can_bid else (np.zeros(0, np.intp),) * 2
        if len(rows) and len(cols):
            if abs(len(rows) - len(cols)) > plan.dead_imbalance * (self.n - len(rows)):
                self.solve_live(rows, cols)
                return LapSolution(self.col_of, self.row_duals(), self.v, self.counts)
            count = min(len(rows), len(cols))
            rows, cols = rows[:count], cols[:count]
        else:
            rows = cols = np.zeros(0, np.intp)
        self.col_of[rows] = ASIDE
        self.v[cols] = -np.inf
        column_reduction(self.matrix, self.sign, self.v, self.row_at, tuple(self.matching))
        if self.at_minima and self.free() > plan.tied_above * self.n:
            tie_reduction(self.matrix, self.sign, self.v, plan.tie_misses, tuple(self.matching), self.counts)
            if can_bid and self.free() > plan.tied_above * self.n:
                # A few rows have the minima of most columns: such duals take longer to undo than zeros.
                self.v[self.v > -np.inf] = 0.0
                self.drop()
        self.list_rows(self.free_rows())
        self.match_free()
        calm = True
        if can_bid and self.free() > plan.auction_above * self.n:
            calm = self.short_auctions()
        else:
            self.reduce_rows()
        reads = int(self.counts[READS]) + plan.reads_before_scaling * self.n if can_bid else np.inf
        if not calm or not self.augment(reads):
            self.scaled_auction()
            self.match_tight()
            self.reduce_rows()
            self.augment()
        if len(rows):
            self.bring_back(rows, cols)
        return LapSolution(self.col_of, self.row_duals(), self.v, self.counts)

    def row_duals(self) -> np.ndarray:
        """Return the least c - v of every row."""
        from fastmatch_kernels.lap.lists import row_duals

        u, lists = np.zeros(self.n), tuple(self.lists)
        read: list[int] = []

        def work(lo: int, hi: int) -> None:
            read.append(row_duals(self.matrix, self.sign, lo, hi, self.v, lists, u))

        over_rows(self.n, self.matrix.size, work)
        self.counts[READS] += sum(read)
        return u

    def list_rows(self, rows: np.ndarray) -> None:
        """Read the candidate lists of some rows, on all cores."""
        from fastmatch_kernels.lap.rows import list_rows

        self.counts[READS] += len(rows)
        lists = tuple(self.lists)

        def read(lo: int, hi: int) -> None:
            list_rows(self.matrix, self.sign, rows[lo:hi], self.v, lists)

        over_rows(len(rows), len(rows) * self.m, read)

    def unlisted_rows(self) -> np.ndarray:
        return np.flatnonzero((self.lists.costs.reshape(self.n, -1)[:, 0] == np.inf) & (self.col_of != ASIDE))

    def constant(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the constant rows and the constant columns (dead units).

        If there are both, all have the same value, because each row meets each column. They are taken out because they tie
        with everything: every list would fill with equal columns, and the auction would creep by eps.
        """
        from fastmatch_kernels.lap.rows import constant_columns, constant_rows

        some = np.linspace(0, self.n - 1, 8).astype(np.intp)
        cols = np.flatnonzero((self.matrix[some] == self.matrix[some[0]]).all(axis=0))
        rows = np.flatnonzero((self.matrix[:, some] == self.matrix[:, :1]).all(axis=1)) if len(cols) else cols
        same = np.ones(len(rows), np.bool_)
        constant_rows(self.matrix, rows, same)
        rows = rows[same]
        if not len(rows) or not len(cols):
            return rows, cols[:0]
        # A constant row has every constant column's value: only the other rows have to be read.
        others = np.delete(np.arange(self.n), rows)
        same, values = np.ones(len(cols), np.bool_), self.matrix[rows[0], cols]
        over_rows(
            len(others),
            len(others) * len(cols),
            lambda lo, hi: constant_columns(self.matrix, others[lo:hi], cols, values, same),
        )
        return rows, cols[same]

    def solve_live(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Solve the problem without its constant rows and columns, and complete the solution.

        The rest is not square. Its unmatched columns (or rows) go to constant rows (or columns), which are indifferent.
        With value c, column duals t there, and row duals c - t, all of that is tight. A live row may prefer a constant
        column, and a constant row a live column: such rows are freed, and shortest paths finish exactly.
        """
        live_rows, live_cols = np.delete(np.arange(self.n), rows), np.delete(np.arange(self.m), cols)
        value = self.sign * float(self.matrix[rows[0], cols[0]])
        inner = self.matrix[np.ix_(live_rows, live_cols)]
        tall = len(live_rows) > len(live_cols)
        live = _DensePhases(np.ascontiguousarray(inner.T) if tall else inner, self.sign, self.schedule, None)
        found, u, v, _ = live.run()
        self.counts += live.counts
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
        # What no live row took has the largest dual: it is as good as a constant column.
        if tall:
            spare = np.setdiff1d(live_rows, live_rows[at_rows])
            self.take(np.concatenate([rows, spare]), cols)
        else:
            spare = np.setdiff1d(live_cols, live_cols[at_cols])
            self.take(rows, np.concatenate([cols, spare]))
        self.augment()

    def take(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Match rows to columns, one by one."""
        self.col_of[rows], self.row_of[cols] = cols, rows
        self.matching.cost_of[rows] = self.sign * self.matrix[rows, cols].astype(np.float64)

    def bring_back(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Return constant rows and columns to a problem that was solved without them.

        With value c and the largest dual t of the other columns, dual t for the constant columns is feasible for the constant
        rows, and tight between the two. Rows that prefer a constant column (at c - t) to what they have are freed, and
        shortest paths finish exactly.
        """
        value = self.sign * float(self.matrix[rows[0], cols[0]])
        others = self.v[self.v > -np.inf]
        top = float(others.max()) if len(others) else 0.0
        self.v[cols] = top
        # These columns are in no list, so their smallest cost bounds the entries outside the lists.
        np.minimum(self.bound, value - top, out=self.bound)
        self.lists.costs.reshape(self.n, -1)[rows] = np.inf
        self.bound[rows] = value - top
        matched = np.flatnonzero(self.col_of >= 0)
        columns = self.col_of[matched]
        worse = self.matching.cost_of[matched] - self.v[columns] > value - top
        self.row_of[columns[worse]] = -1
        self.col_of[matched[worse]] = FREE
        self.col_of[rows], self.row_of[cols], self.matching.cost_of[rows] = cols, rows, value
        self.augment()

    def spread(self) -> float:
        """Return the standard deviation of the listed costs."""
        listed = self.lists.costs[np.isfinite(self.lists.costs)].astype(np.float64)
        largest = np.abs(listed).max(initial=0.0)
        return float((listed / largest).std() * largest) if largest > 0 else 0.0  # squares of 1e200 overflow

    def refresh(self) -> float:
        """Return the mean difference between a row's best two; read the rows whose lists are outdated, if these are many."""
        from fastmatch_kernels.lap.lists import mean_gap

        stale = np.zeros(self.n, np.bool_)
        gap = mean_gap(self.matrix, self.v, tuple(self.lists), self.col_of, stale)
        if stale.sum() > self.schedule.repeat_above * self.n:
            self.list_rows(np.flatnonzero(stale))
        return float(gap)

    def short_auctions(self) -> bool:
        """Run phases at a small eps, whose near-optimal duals make the searches short; return False for a price war."""
        plan = self.schedule
        self.list_rows(self.unlisted_rows())
        eps = plan.short_eps * self.refresh()
        self.drop()
        for _ in range(plan.short_phases):
            if not 0 < eps < np.inf:
                break
            enough = int(plan.short_leaves * self.n)
            left = self.bid(self.free_rows(), eps, plan.short_bids * self.n, enough, self.n)
            self.refresh()
            self.match_tight()
            if len(left) > int(plan.war_above * self.n):
                return False
            self.reduce_rows()
            if self.free() <= plan.repeat_above * self.n:
                break
            eps *= plan.short_factor
        return True

    def scaled_auction(self) -> None:
        self.list_rows(self.unlisted_rows())
        super().scaled_auction()


def compile_kernels(dtype: np.dtype) -> None:
    """Load or compile the kernels for one type of entries; a warning tells that they are being compiled."""

    def run_tiny() -> None:
        tiny = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 7.0], [3.0, 6.0, 9.5]], dtype=dtype)
        tried = _DensePhases(tiny, 1.0, DenseSchedule(), None)
        tried.run()
        tried.scaled_auction()

    prepared(f"the assignment kernels for {dtype}", ("dense", dtype.char), run_tiny)
