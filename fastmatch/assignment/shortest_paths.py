"""Shortest augmenting paths in numpy: the solver that compiles nothing (Jonker and Volgenant 1987)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmatch.assignment.gap import duality_gap
from fastmatch.assignment.problem import Infeasible, LapProblem, LapSolution, TooLarge, check_entries
from fastmatch_kernels.lap.state import HUGE, POPS, SEARCHES

__all__ = ["ShortestPaths", "TooManyPops"]

SWEEPS = 8
"""Sweeps that raise duals at most; one is nearly always enough."""


class TooManyPops(Exception):
    """The paths pop more columns than they may: a compiled solver is worth its loading."""


@dataclass(frozen=True)
class ShortestPaths:
    """Solve a matrix without compiled code: for a few small problems, which take less time than loading kernels does.

    A compiled solver takes a tenth of the time from the second call on. +inf (-inf for a maximisation) forbids an entry.

    Args:
        most_pops: columns that the paths may pop; beyond them :class:`TooManyPops` is raised. None: any number.

    Example:
        >>> from fastmatch.assignment.shortest_paths import ShortestPaths
        >>> fm.solve(np.random.rand(20, 20), solver=ShortestPaths()).is_certified
        True
    """

    most_pops: int | None = None

    def solve(self, problem: LapProblem) -> LapSolution:
        """Solve the problem: see :meth:`Solver.solve`.

        Raises:
            TooManyPops: the paths are longer than asked for.
        """
        matrix = problem.matrix(self)
        check_entries(matrix, problem.sign)
        costs = problem.sign * matrix.astype(np.float64)
        finite = np.isfinite(costs)
        with np.errstate(over="ignore"):
            size = np.abs(costs, where=finite, out=np.zeros_like(costs)).sum()
        if not size < HUGE:
            raise TooLarge
        search = _Search(costs, _first_duals(costs, problem.finite_start))
        for row in search.match_rows():
            if self.most_pops is not None and search.counts[POPS] > self.most_pops:
                raise TooManyPops
            search.augment(row)
        u = search.close()
        return LapSolution(search.col_of, u, search.v, search.counts)


def _first_duals(costs: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """Return the given duals, the columns' minima, or zeros, which are the largest where columns stay unmatched."""
    n, m = costs.shape
    if start is not None:
        return start
    least = costs.min(axis=0, initial=np.inf) if n == m else np.zeros(m)
    return np.where(np.isfinite(least), least, 0.0)


class _Search:
    """A matching whose pairs are tight, ``c - v`` is the least of the row there, and which grows by shortest paths."""

    def __init__(self, costs: np.ndarray, v: np.ndarray) -> None:
        n, m = costs.shape
        self.costs, self.v = costs, v
        self.col_of, self.row_of = np.full(n, -1), np.full(m, -1)
        self.counts = np.zeros(4, np.int64)

    def match_rows(self) -> list[int]:
        """Match rows to free columns that are tight, and return the rows that find none."""
        reduced = self.costs - self.v
        tight = (reduced == reduced.min(axis=1, keepdims=True)) & (reduced < np.inf)
        left = []
        for row, columns in enumerate(tight):
            wanted = np.flatnonzero(columns & (self.row_of < 0))
            if len(wanted):
                self.col_of[row], self.row_of[wanted[0]] = wanted[0], row
            else:
                left.append(row)
        return left

    def augment(self, free: int) -> None:
        """Match a free row along the shortest path to a free column (Dijkstra), and keep the pairs tight.

        Raises:
            Infeasible: no path avoids the forbidden entries.
        """
        costs, v, row_of = self.costs, self.v, self.row_of
        distance = costs[free] - v  # of columns; inf once they are scanned
        came_from = np.full(len(v), free)
        is_open = np.ones(len(v), bool)
        scanned, lengths = [], []
        while True:
            column = int(distance.argmin())
            length = distance[column]
            if length == np.inf:
                raise Infeasible("cost: no assignment avoids the forbidden entries")
            row = int(row_of[column])
            if row < 0:
                break
            scanned.append(column)
            lengths.append(length)
            is_open[column], distance[column] = False, np.inf
            step = costs[row] - v
            step += length - step[column]
            shorter = (step < distance) & is_open
            np.copyto(distance, step, where=shorter)
            came_from[shorter] = row
        v[scanned] += np.minimum(
            np.array(lengths) - length, 0.0
        )  # rounding must not raise them: duals only fall
        while True:
            row = int(came_from[column])
            self.row_of[column], self.col_of[row], column = row, column, int(self.col_of[row])
            if row == free:
                break
        self.counts[POPS] += len(scanned)
        self.counts[SEARCHES] += 1

    def close(self) -> np.ndarray:
        """Return the row duals, after raising column duals that rounding has left too small for the certificate."""
        costs, v, col_of = self.costs, self.v, self.col_of
        n, m = costs.shape
        matched = costs[np.arange(n), col_of]
        for _ in range(SWEEPS):
            u = (costs - v).min(axis=1)
            gap, bound = duality_gap(matched, u, v, col_of)
            if gap <= bound:
                break
            for row, column in enumerate(col_of):
                tight = matched[row] - (costs[row] - v).min()
                v[column] = max(v[column], tight if n == m else min(tight, 0.0))
        return (costs - v).min(axis=1)
