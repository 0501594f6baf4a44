"""The state of a solve of a matrix on the host, and reads of its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmatch.assignment.phases import Phases, deviation
from fastmatch.assignment.problem import TooLarge, check_entries
from fastmatch.assignment.schedule import DenseSchedule
from fastmatch_kernels._numba.parallel import over_rows
from fastmatch_kernels.lap.schedule import CROWDED_FROM
from fastmatch_kernels.lap.state import (
    CAPACITY,
    FEW_ROWS,
    HUGE,
    READS,
    VECTOR,
    WORST_SHARE,
    Costs,
    State,
    is_nearly_square,
    matrix_lists,
    new_best,
)

__all__ = ["DenseMatrix", "restore"]

SURVEYED = 8
"""Part of the rows of a rectangle that tells whether rows want the same columns. Then the others' best columns are kept."""


class DenseMatrix(Phases):
    """A matrix, what a solve has found so far, and what reads of its rows tell."""

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
        unshared = self.as_square or len(np.unique(self.state.columns[:some])) == some
        read(some, self.n, survey if unshared else survey_best)
        self.counts[READS] += self.n
        return sum(sizes)

    def match_surveyed(self) -> None:
        """Match rows to a free column among their best, as the survey has found them."""
        from fastmatch_kernels.lap.match import match_surveyed

        match_surveyed(self.costs, self.state, 0, self.n)
        self.list_best()

    def tied(self) -> float:
        """Return the share of the rows whose least two costs tie. Ask before rows bid: bids overwrite ``seconds``."""
        return float((self.state.seconds == self.state.least).mean())

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

    def list_rows(self, rows: np.ndarray) -> None:
        """Read the candidate lists of some rows, on all cores."""
        from fastmatch_kernels.lap.rows import list_rows

        self.counts[READS] += len(rows)
        lists = tuple(self.lists)

        def read(lo: int, hi: int) -> None:
            list_rows(self.matrix, self.sign, rows[lo:hi], self.v, lists)

        over_rows(len(rows), len(rows) * self.m, read)

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

    def spread(self) -> float:
        """Return the standard deviation of the listed costs."""
        return deviation(self.lists.costs[np.isfinite(self.lists.costs)].astype(np.float64))

    def held(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the arrays that an auction changes, each with a copy."""
        return [
            (x, x.copy())
            for x in (self.v, *self.matching, self.lists.bound, self.lists.costs, self.lists.cols)
        ]


def restore(held: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Give arrays back the contents that were kept beside them."""
    for x, old in held:
        x[:] = old
