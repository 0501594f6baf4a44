"""The solver for matrices: first duals, candidate lists that are refilled on demand, an auction if it pays, paths.

docs/design/assignment.md says why lists that are refilled on demand are exact, and what each step costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_type
from fastmatch.assignment._compile import prepared
from fastmatch.assignment.copies import find_copies
from fastmatch.assignment.dense_bids import DenseBids
from fastmatch.assignment.problem import Infeasible, LapProblem, LapSolution, TooLarge
from fastmatch.assignment.reading import for_kernels
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels.lap.state import CROWDED_SHARE, KEPT, READS, matrix_lists

__all__ = ["DenseShortlists"]

NARROWED = 1 << 27
"""Entries up to which a float64 matrix is copied to float32: half a gigabyte."""

NARROWED_ABOVE = 1 / 16
"""Fraction of the rows: if more are free after the first steps, many reads follow."""


@dataclass(frozen=True)
class DenseShortlists:
    """Solve a matrix with a short candidate list per row: the choice beyond 2^23 entries, and where paths are long.

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
    pairs per row in addition to the matrix, 8 more in rectangles, and a float32 copy of a float64 matrix of up to 2^27 entries that float32 holds.
    """

    schedule: DenseSchedule = field(default_factory=DenseSchedule)

    def __post_init__(self) -> None:
        check_type("schedule", self.schedule, DenseSchedule)

    def solve(self, problem: LapProblem) -> LapSolution:
        """Solve the problem: see :meth:`Solver.solve`."""
        matrix = for_kernels(problem.matrix(self))
        compile_kernels(matrix.dtype)
        phases = _DensePhases(matrix, problem.sign, self.schedule, problem.finite_start)
        try:
            phases.run()
        except Infeasible:
            if phases.factor == 1.0:
                raise
            raise TooLarge from None  # large entries were forbidden, and are needed
        return phases.solution()


class _DensePhases(DenseBids):
    """The order of the steps, other first duals, and copies."""

    def run(self) -> None:
        """Solve the problem."""
        self.survey()
        if not self.free() or (self.solve_free() and self.level_columns()):
            return
        self.begin_again(as_square=True)
        if self.solve_free() and self.level_columns():
            return
        self.begin_again(as_square=False)
        self.limit = np.inf
        self.solve_free()

    def begin_again(self, *, as_square: bool) -> None:
        """Begin a problem of more columns than rows from zeros, as a square one or as it is."""
        self.as_square = as_square
        self.drop()
        self.state.v.fill(0.0)
        self.read_all(whole=True)
        self.match_surveyed()

    def solution(self) -> LapSolution:
        """Return what was found."""
        u, v = self.row_duals(), self.v
        if self.factor != 1.0:
            u, v = u / self.factor, v / self.factor
        return LapSolution(self.col_of, u, v, self.counts)

    def solve_free(self) -> bool:
        """Match the free rows: by bids if these settle most of them, then by shortest paths.

        Returns:
            False if paths are so long that a problem of more columns than rows is better solved as a square one.
        """
        plan = self.schedule
        others: np.ndarray | None = None
        zeros: list[tuple[np.ndarray, np.ndarray]] | None = None
        expected = 0.0
        crowded = plan.crowded_above * self.n
        if not self.warm and self.free() > crowded:
            self.reduce_surveyed()
        if self.as_square and not self.warm and self.free() > crowded:
            scans = plan.short_tied_scans if self.tied() > 0.5 else plan.short_scans
            expected = self.augment_by_rows(scans * self.n, 1 / 16)
            if expected == 0.0:
                return True
            if self.free() > crowded:
                free, found = self.better_duals()
                if free <= plan.accepted_below * self.n:
                    if free > NARROWED_ABOVE * self.n:
                        self.narrow()
                    zeros = self.begin_at(found)
                elif free <= self.n:
                    others = found
        if not self.as_square:
            tied = self.tied()
            self.reduce_by_rows()
            if self.free() <= plan.auction_above * self.n:
                return self.finish(True)
            # Where nearly all rows are free, the first paths tell whether they grow.
            tries = tied > 0.5 and self.free() <= CROWDED_SHARE * self.n
            if tries and self.augment_by_rows(plan.short_tied_scans * self.n, 1 / 16) == 0.0:
                return True
            if self.solve_copies(tied):
                return True
            if self.limit < np.inf and self.free() > CROWDED_SHARE * self.n and self.paths_grow():
                return self.solve_equal_rows()
        if zeros is None and self.free() > NARROWED_ABOVE * self.n:
            self.narrow()
        if not self.free() or (self.as_square and self.solve_copies(self.tied())):
            return True
        calm = self.bids(plan.slow_above if others is None else plan.slow_above_others)
        if not calm and others is not None:
            expected = self.augment_by_rows(expected, 1 / 16)
            if expected == 0.0:
                return True
            zeros = self.begin_at(others)
            calm = self.bids(plan.slow_above)
            if calm:
                zeros = None
        if zeros is not None and self.take_turns(expected, zeros, accepted=others is None, calm=calm):
            return True
        return self.finish(calm)

    def finish(self, calm: bool) -> bool:
        """Match the free rows by shortest paths; if these would be long and costs are distinct, by eps-scaling first.

        Returns:
            False as :meth:`solve_free`.
        """
        plan = self.schedule
        if self.by_rows and self.distinct and self.augment_by_rows(plan.few_scans * self.n, 1 / 4) == 0.0:
            return True
        dear = 2 * plan.scans_before_scaling * self.n
        steps = plan.list_steps * self.limit
        if self.distinct and self.augment_by_lists(min(np.inf if calm else dear, steps)):
            return True
        scaled = self.as_square and self.distinct
        scans = self.augment_by_rows(
            min(plan.scans_before_scaling * self.n, self.limit) if scaled else self.limit
        )
        if scans == 0.0:
            return True
        if not scaled:
            return False
        if self.scaled_auction_within(min(scans, self.limit)) and self.augment_by_lists(steps):
            return True
        return self.augment_by_rows(self.limit) == 0.0

    def narrow(self) -> None:
        """Go on with a float32 copy if that holds all entries: each later pass reads half as many bytes."""
        from fastmatch_kernels.lap.narrow import narrow

        if self.matrix.dtype == np.float32 or self.matrix.size > NARROWED:
            return
        copy = np.empty(self.matrix.shape, np.float32)
        if narrow(self.flat, copy.reshape(-1)):
            compile_kernels(copy.dtype)
            self.matrix, self.flat = copy, copy.reshape(-1)
            self.lists = matrix_lists(self.n, copy.dtype)
            self.list_best()

    def better_duals(self) -> tuple[int, np.ndarray]:
        """Look for other first duals.

        Returns:
            The rows that they leave free (n + 1 if none are better), and what was found from them, as kernels keep it.
        """
        from fastmatch_kernels.lap.duals import better_duals

        plan = self.schedule
        numbers = (plan.better_minima, plan.better_centres, plan.tail)
        found = np.empty(KEPT * self.m + len(self.state.v))
        return int(better_duals(self.costs, self.state, numbers, found, 0)), found

    def begin_at(self, found: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Begin again from what was found from other duals.

        Returns:
            The arrays that this changes, each with what it held.
        """
        from fastmatch_kernels.lap.kept import take

        state = self.state
        held = [*self.held(), *((x, x.copy()) for x in (state.least, state.seconds, state.columns))]
        take(found, 0, state)
        self.list_best()
        return held

    def solve_copies(self, tied: float) -> bool:
        """Solve a problem most of whose columns are copies of others, or most of whose rows; return whether it is one."""
        plan = self.schedule
        if self.warm or self.free() <= plan.auction_above * self.n:
            return False
        # A copy of a row's best column ties with it; equal rows want the same column.
        if tied > 0.5 and self.solve_equal_columns():
            return True
        return self.as_square and self.free() > plan.crowded_above * self.n and self.solve_equal_rows()

    def solve_equal_columns(self) -> bool:
        """Solve a problem most of whose columns are copies of others; return whether it is one."""
        copies = find_copies(self.matrix, self.schedule.copied_below, columns=True)
        if copies is None:
            return False
        self.v[:] = self.fill_columns(*copies, self.col_of)[copies[1]]
        self.row_of.fill(-1)
        self.row_of[self.col_of] = np.arange(self.n)
        self.note_costs()
        return True

    def solve_equal_rows(self) -> bool:
        """Solve a problem most of whose rows are copies of others; return whether it is one.

        Where there are more columns than rows, rows of zeros take those that are left, and are copies of each other.
        """
        copies = find_copies(self.matrix, self.schedule.copied_below, columns=False)
        if copies is None:
            return False
        kinds, group, room = copies
        spare = self.m - self.n
        if spare:
            group, room = np.append(group, np.full(spare, len(kinds))), np.append(room, spare)
            kinds = np.concatenate([kinds, np.zeros((1, self.m), kinds.dtype)])
        duals = self.fill_columns(kinds.T, group, room, self.row_of)
        self.v[:] = -duals[-1]  # what a column has that a row of zeros takes
        matched = np.flatnonzero(self.row_of < self.n)
        self.col_of[self.row_of[matched]] = matched
        self.row_of[self.row_of >= self.n] = -1
        self.note_costs()
        self.v[self.col_of] = self.matching.cost_of - duals[group[: self.n]]
        return True

    def fill_columns(
        self, kinds: np.ndarray, group: np.ndarray, room: np.ndarray, matched: np.ndarray
    ) -> np.ndarray:
        """Solve a problem with one column for all copies of a column; return the duals of these columns.

        Args:
            kinds, group, room: as :func:`find_copies` returns them.
            matched: where the column of each row goes.
        """
        from fastmatch_kernels.lap.copies import fill_columns
        from fastmatch_kernels.lap.order import shuffle

        n = len(matched)
        order, duals, found = np.arange(n), np.zeros(len(room)), np.full(n, -1, np.int64)
        shuffle(order, n)
        flat = np.ascontiguousarray(kinds).reshape(-1)
        if fill_columns(flat, len(room), self.sign, room, duals, found, order, self.counts) >= 0:
            raise Infeasible("cost: no assignment avoids the forbidden entries")
        self.counts[READS] += n
        by_row, by_col = np.argsort(found, kind="stable"), np.argsort(group, kind="stable")
        begin = np.concatenate([[0], np.cumsum(room)])[found[by_row]]
        rank = np.arange(n) - np.searchsorted(found[by_row], found[by_row], "left")
        matched[by_row] = by_col[begin + rank]
        # Bounds were read under other duals.
        self.lists.bound.fill(-np.inf)
        self.lists.costs.fill(np.inf)
        return duals


def compile_kernels(dtype: np.dtype) -> None:
    """Load or compile the kernels for one type of entries; a warning tells that they are being compiled."""
    from fastmatch_kernels.lap.match import survey_best

    def run_tiny() -> None:
        # float32 does not hold 9.6. A matrix that it holds would go on with the kernels of float32.
        tiny = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 7.0], [3.0, 6.0, 9.6]], dtype=dtype)
        tried = _DensePhases(tiny, 1.0, DenseSchedule(), None)
        tried.run()
        tried.scaled_auction(lambda: False)
        tried.refine()
        tried.drop()
        tried.augment_by_lists(np.inf)
        tried.solution()
        wide = _DensePhases(tiny[:2], 1.0, DenseSchedule(), None)
        wide.survey()
        survey_best(wide.costs, wide.state, 0, 2, True)
        wide.drop()
        wide.reduce_by_rows()
        wide.drop()
        wide.augment_by_rows(np.inf)
        wide.level_columns()

    prepared(f"the assignment kernels for {dtype}", ("dense", dtype.char), run_tiny)
