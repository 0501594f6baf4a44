"""Shortest augmenting paths in a matrix, over lists and over whole rows, which end where another way is expected to be quicker."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment.dense_matrix import DenseMatrix
from fastmatch.assignment.phases import SLICE
from fastmatch_kernels.lap.state import (
    ACCEPTED,
    FEW_PATHS,
    GROWING,
    GROWN,
    POPS,
    READS,
    SEARCHES,
    TURNS,
    new_paths,
)

__all__ = ["DensePaths"]


class DensePaths(DenseMatrix):
    """Paths from the free rows."""

    def by_least(self) -> np.ndarray:
        """Return the free rows in the order of their least cost at first if that shortens paths: see :func:`sort_by`."""
        from fastmatch_kernels.lap.order import shuffle, sort_by

        rows = self.free_rows()
        shuffle(rows, len(rows))
        if not self.as_square:
            sort_by(rows, FEW_PATHS, len(rows), self.state.least)
        return rows

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

    def level_columns(self) -> bool:
        """Give unmatched columns the same dual, the largest; return False if that takes too many scans."""
        from fastmatch_kernels.lap.paths import level_columns

        if self.n == self.m:
            return True
        level = level_columns(self.costs, self.state, self.limit)
        self.note_costs()
        return bool(level < np.inf)
