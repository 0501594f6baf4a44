"""The solver for matrices: first duals, candidate lists that are refilled on demand, an auction if it pays, paths.

docs/design/assignment.md says why lists that are refilled on demand are exact, and what each step costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastmatch._internal.checks import check_type
from fastmatch.assignment._compile import prepared
from fastmatch.assignment.copies import find_copies
from fastmatch.assignment.phases import SLICE, Phases, deviation
from fastmatch.assignment.problem import (
    Infeasible,
    LapProblem,
    LapSolution,
    TooLarge,
    check_entries,
)
from fastmatch.assignment.reading import for_kernels
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.lap.schedule import CROWDED_FROM
from fastmatch_kernels.lap.state import (
    ACCEPTED,
    BIDS,
    CAPACITY,
    CROWDED_SHARE,
    FEW_PATHS,
    FEW_ROWS,
    GROWING,
    GROWN,
    HUGE,
    KEPT,
    POPS,
    READS,
    SEARCHES,
    SLICES,
    TURNS,
    VECTOR,
    WORST_SHARE,
    Costs,
    State,
    is_nearly_square,
    matrix_lists,
    new_best,
    new_paths,
)

__all__ = ["DenseShortlists"]

NARROWED = 1 << 27
"""Entries up to which a float64 matrix is copied to float32: half a gigabyte."""

NARROWED_ABOVE = 1 / 16
"""Fraction of the rows: if more are free after the first steps, many reads follow."""

SURVEYED = 8
"""Part of the rows of a rectangle that tells whether rows want the same columns. Then the others' best columns are kept."""

SCANNED = 1 << 28
"""Entries that bids over whole rows may scan in one call, which no signal interrupts."""


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
        self.flat = matrix.reshape(-1)
        # Whether it is solved as a square problem.
        self.as_square = self.m > 1 and is_nearly_square(self.n, self.m)
        self.limit = np.inf  # scans that paths may take before it is begun in another way
        if not self.as_square and self.n >= CROWDED_FROM:
            self.limit = float(self.n * (self.n // WORST_SHARE))
        self.warm = start is not None
        # Kernels load whole vectors of duals.
        duals = np.zeros(-(-self.m // VECTOR) * VECTOR)
        self.v = duals[: self.m]
        if start is not None:
            self.v[:] = start
        least, seconds = np.empty(self.n), np.empty(self.n)
        columns, stack = np.empty(self.n, np.int64), np.empty(self.n, np.int64)
        self.state = State(
            duals, self.row_of, self.col_of, least, seconds, columns, stack, self.counts, new_best(0)
        )
        self.factor = 1.0  # of the costs, so that their sums stay in float64
        self.by_rows = False  # whether bids read whole rows and not lists
        self.made = self.read_again = 0  # bids over lists, and the lists that were read for them
        self.distinct = False  # whether most rows have a single best column

    @property
    def costs(self) -> Costs:
        """The costs, as kernels over whole rows take them."""
        return Costs(self.flat, 0, self.n, self.m, self.sign)

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

    def survey(self) -> None:
        """Read the matrix once, check its entries, and match rows to a free column among their best."""
        from fastmatch_kernels.lap.scale import fitting_scale

        if not self.read_all() < HUGE:
            scale = fitting_scale(self.flat, 0, self.flat.size, self.sign)
            if scale == 0.0:
                check_entries(self.matrix, self.sign)
            self.factor = abs(scale)
            if self.factor < 1.0 or self.factor == np.inf:
                raise TooLarge
            if self.factor > 1.0:
                self.sign, self.warm = scale, False
                self.state.v.fill(0.0)
            self.read_all(whole=True)
        self.match_surveyed()

    def match_surveyed(self) -> None:
        """Match rows to a free column among their best, as the survey has found them."""
        from fastmatch_kernels.lap.match import match_surveyed

        match_surveyed(self.costs, self.state, 0, self.n)
        self.list_best()

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

    def read_all(self, *, whole: bool = False) -> float:
        """Survey all rows; return the sum of sizes. Unless ``whole``, only the first rows if their sum is HUGE already."""
        from fastmatch_kernels.lap.match import survey, survey_best

        sizes: list[float] = []

        def read(lo: int, hi: int, kernel: Callable[..., float] = survey) -> None:
            over_rows(
                hi - lo,
                (hi - lo) * self.m,
                lambda a, b: sizes.append(kernel(self.costs, self.state, lo + a, lo + b, whole)),
            )

        # What was kept may be of higher duals, or of other costs.
        self.state = self.state._replace(best=new_best(0 if self.as_square else self.n))
        few = min(self.n, FEW_ROWS)
        read(0, few)
        if not (whole or sum(sizes) < HUGE):
            return sum(sizes)
        some = few if self.as_square else max(few, self.n // SURVEYED)
        read(few, some)
        distinct = self.as_square or len(np.unique(self.state.columns[:some])) == some
        read(some, self.n, survey if distinct else survey_best)
        self.counts[READS] += self.n
        return sum(sizes)

    def list_best(self) -> None:
        """Begin the lists with what the survey has found: each row's best column, and a bound on the others."""
        lists = self.lists
        lists.costs.fill(np.inf)
        lists.bound[:] = self.state.seconds
        lists.cols[::CAPACITY] = self.state.columns
        rows = np.arange(self.n)
        lists.costs[::CAPACITY] = (
            self.sign * self.matrix[rows, self.state.columns] if self.state.v.any() else self.state.least
        )
        self.note_costs()

    def note_costs(self) -> None:
        """Write the costs of the matched pairs."""
        from fastmatch_kernels.lap.lists import note_costs

        note_costs(self.matrix, self.sign, self.col_of, self.matching.cost_of)

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

    def tied(self) -> float:
        """Return the share of the rows whose least two costs tie. Bids that follow the first read change what it is told by."""
        return float((self.state.seconds == self.state.least).mean())

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

    def paths_grow(self) -> bool:
        """Take a few paths; return whether each scans nearly as many rows as had paths before it."""
        from fastmatch_kernels.lap.paths import paths

        rows, before = self.by_least()[:GROWN], int(self.counts[POPS])
        at = paths(self.costs, self.state, rows, 0, self.matrix.size)
        if at < 0:
            raise self.infeasible(-1 - at)
        scanned = int(self.counts[POPS]) - before
        self.counts[READS] += scanned
        self.note_costs()
        return len(rows) == GROWN and scanned > GROWING * 0.5 * GROWN * GROWN

    def take_turns(
        self, expected: float, other: list[tuple[np.ndarray, np.ndarray]], *, accepted: bool, calm: bool
    ) -> bool:
        """Augment over whole rows from these duals and from other ones in turns, until one is expected to end sooner.

        Args:
            expected: scans that the other one's paths are expected to take.
            other: arrays, each with its contents for the other duals.
            accepted: whether these duals left few rows free: see :data:`ACCEPTED`.
            calm: whether an auction has paid. Then paths go on over lists, and only a few are tried here.

        Returns:
            Whether no row is free any more.
        """
        ahead = ACCEPTED if accepted else 1.0
        scans = 0.0 if calm else ahead * expected
        for _ in range(TURNS):
            rest = self.augment_by_rows(scans, 1 / 16)
            if rest <= ahead * expected:
                return rest == 0.0
            for x, old in other:
                kept = x.copy()
                x[:] = old
                old[:] = kept
            expected = scans = rest
            ahead = 1.0
        return False

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

    def finish(self, calm: bool) -> bool:
        """Match the free rows by shortest paths; if these would be long and costs are distinct, by eps-scaling first.

        Returns:
            False as :meth:`solve_free`.
        """
        plan = self.schedule
        if self.by_rows and self.distinct and self.augment_by_rows(plan.few_scans * self.n) == 0.0:
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

    def level_columns(self) -> bool:
        """Give unmatched columns the same dual, the largest; return False if that takes too many scans."""
        from fastmatch_kernels.lap.paths import level_columns

        if self.n == self.m:
            return True
        level = level_columns(self.costs, self.state, self.limit)
        self.note_costs()
        return bool(level < np.inf)

    def reduce_surveyed(self) -> None:
        """Run row reduction by what the survey has found, if that matches half of the free rows."""
        from fastmatch_kernels.lap.match import reduce_surveyed

        rows = self.free_rows()
        self.state.stack[: len(rows)] = rows[::-1]
        reduce_surveyed(self.costs, self.state, len(rows))
        self.note_costs()

    def reduce(self) -> None:
        """Run a pass of augmenting row reduction (Jonker and Volgenant 1987)."""
        rows = self.free_rows()
        if len(rows):
            self.bid(rows, 0.0, len(rows) + int(self.schedule.extra_steps * self.n))

    def reduce_on(self) -> bool:
        """Go on with row reduction while it matches many of the rows; return whether few are left."""
        rows, plan = self.free_rows(), self.schedule
        before = self.n
        while len(rows) and len(rows) <= plan.busy_above * before:
            before = len(rows)
            rows = self.bid(rows, 0.0, self.n // SLICES + 1)
        return self.free() <= plan.reduced_above * self.n

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

    def reduce_rows(self) -> None:
        """Run two passes of augmenting row reduction."""
        self.reduce()
        self.reduce()

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

    def row_duals(self) -> np.ndarray:
        """Return the least c - v of every row."""
        from fastmatch_kernels.lap.lists import row_duals

        u, (lists, matching) = np.zeros(self.n), self.arrays
        read: list[int] = []

        def work(lo: int, hi: int) -> None:
            read.append(row_duals(self.matrix, self.sign, lo, hi, self.v, lists, matching, u))

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

    def spread(self) -> float:
        """Return the standard deviation of the listed costs."""
        return deviation(self.lists.costs[np.isfinite(self.lists.costs)].astype(np.float64))

    def match_tight(self) -> None:
        """Free the rows whose match is not their best, and match free rows to free columns among their best."""
        from fastmatch_kernels.lap.lists import keep_tight

        keep_tight(self.matrix, self.v, *self.arrays)
        self.match_free()

    def refine(self) -> None:
        """Lower duals so that most matches become their row's best."""
        from fastmatch_kernels.lap.refine import refine

        refine(self.flat, self.m, self.sign, self.state.v, *self.arrays, self.counts)

    def held(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the arrays that an auction changes, each with a copy."""
        return [
            (x, x.copy())
            for x in (self.v, *self.matching, self.lists.bound, self.lists.costs, self.lists.cols)
        ]

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

    def by_least(self) -> np.ndarray:
        """Return the free rows in the order of their least cost at first if that shortens paths: see :func:`sort_by`."""
        from fastmatch_kernels.lap.order import shuffle, sort_by

        rows = self.free_rows()
        shuffle(rows, len(rows))
        if not self.as_square:
            sort_by(rows, FEW_PATHS, len(rows), self.state.least)
        return rows

    def augment_by_lists(self, most: float) -> bool:
        """Augment over the lists while these save reads, and are expected to take no more than ``most`` steps.

        Returns:
            Whether no row is free any more.
        """
        from fastmatch_kernels.lap.augment import augment

        plan = self.schedule
        paths = tuple(new_paths(self.n, self.m))
        sources, at = self.by_least(), 0
        before = last = self.counts.copy()
        while at < len(sources):
            at, _ = augment(
                self.matrix, self.sign, self.v, *self.arrays, sources, at, plan.slice_steps * self.n,
                tuple(self.refills), 0, paths, self.counts,
            )  # fmt: skip
            if at < 0:
                raise self.infeasible(-1 - at)
            if at >= len(sources):
                break
            spent, now = self.counts - before, self.counts - last
            last = self.counts.copy()
            if spent[READS] > plan.few_reads * self.n and now[READS] > plan.dear_reads * now[POPS]:
                return False
            left = (len(sources) - at) * now[POPS] / max(now[SEARCHES], 1)
            if spent[POPS] + left > most:
                return False
        return True

    def augment_by_rows(self, scans: float, first: float = 4.0) -> float:
        """Augment over whole rows until the paths are expected to scan more than ``scans`` rows.

        Args:
            scans: infinite to go on to the end.
            first: scans per row after which it is first asked.

        Returns:
            0 if no row is free any more, else the scans that the rest is expected to take.
        """
        from fastmatch_kernels.lap.paths import paths

        order = self.by_least()
        at, spent = 0, 0
        step = max(256, SLICE // self.m * 32) if scans == np.inf else max(1, int(first * self.n))
        while at < len(order):
            before, start, used = int(self.counts[POPS] + self.counts[SEARCHES]), at, 0
            while at < len(order) and (used < step or at - start < FEW_PATHS):
                at = paths(self.costs, self.state, order, at, step)
                if at < 0:
                    raise self.infeasible(-1 - at)
                used = int(self.counts[POPS] + self.counts[SEARCHES]) - before
            self.counts[READS] += used
            spent += used
            rest = (len(order) - at) * used / (at - start)
            if rest and spent + rest > scans:
                self.note_costs()
                return 2 * rest  # later paths are longer
        self.note_costs()
        return 0.0

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


def restore(held: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Give arrays back the contents that were kept beside them."""
    for x, old in held:
        x[:] = old


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
