"""A matrix on a device, solved by candidate lists: how many rows are read, how much is copied to the host.

    python -m bench.reports.device_cost

Runs on the CPU. Reading rows, which a GPU would do, is timed apart: what remains is the host's part. How long a GPU takes
to read rows is not known from this.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from bench.lib import record
from bench.lib.problems import problem
from fastmatch.assignment import CandidateLists, DenseShortlists, DeviceCost, LapProblem, solve

NAME = "device_cost"
KINDS = ("uniform", "factors 256", "sibling 1", "log-normal 256", "ties", "constant")
"""Instances of bench/lib/problems.py."""


def instances(n: int) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in KINDS:
        yield kind, torch.from_numpy(problem(kind, n))
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, n, 2, generator=generator)
    yield "distances in the plane", torch.cdist(*points)
    yield "sorted rows", torch.rand(n, n, generator=generator).sort(1).values


class Timed(DeviceCost):
    """Counts rows, rounds, copied numbers and seconds of the reading that a GPU would do."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.rows = self.rounds = self.numbers = 0
        self.seconds = 0.0

    def _timed(self, read, rows, k):
        begin = time.perf_counter()
        found = read()
        self.seconds += time.perf_counter() - begin
        self.rows, self.rounds, self.numbers = self.rows + rows, self.rounds + 1, self.numbers + rows * k
        return found

    def row_topk(self, v, k, rows=None, sign=1.0):
        count = self.shape[0] if rows is None else len(rows)
        return self._timed(
            lambda: super(Timed, self).row_topk(v, k, rows, sign), count, min(k, self.shape[1])
        )

    def row_min(self, v, sign=1.0):
        return self._timed(lambda: super(Timed, self).row_min(v, sign), self.shape[0], 1)


def row(kind: str, matrix: torch.Tensor) -> record.Row:
    solve(matrix[:50, :50], solver=DenseShortlists())
    CandidateLists().solve(LapProblem(DeviceCost(matrix[:50, :50]), 1.0))  # compiled
    begin = time.perf_counter()
    dense = solve(matrix, solver=DenseShortlists())
    dense_seconds = time.perf_counter() - begin
    cost = Timed(matrix)
    begin = time.perf_counter()
    found = CandidateLists().solve(LapProblem(cost, 1.0))
    host = time.perf_counter() - begin - cost.seconds
    if found is not None:
        total = float(matrix.double()[np.arange(len(matrix)), found[0]].sum())
        if abs(total - dense.objective) > dense.gap_bound + 1e-12 * abs(total):
            raise AssertionError(f"{kind}: {total} by lists, {dense.objective} by the dense solver")
    return {
        "cost": kind,
        "n": len(matrix),
        "lists": "accepted" if found is not None else "given up",
        "passes over the matrix": cost.rows / len(matrix),
        "rounds": cost.rounds,
        "fraction copied to the host": cost.numbers / matrix.numel(),
        "host (s)": host,
        "dense solver (s)": dense_seconds,
    }


def measure(options: argparse.Namespace) -> record.Record:
    n = 100 if options.tiny else 4096
    return record.record(row(kind, matrix) for kind, matrix in instances(n))


NOTE = (
    "Each row is one run on a float32 matrix. Rows are read on the CPU here, and that time is left out: on a GPU it is not "
    "known. A round reads the rows whose lists ran out. (index, cost) pairs are copied to the host; their number is given as "
    "a fraction of the matrix's entries. Where lists are given up, the matrix is copied and the time of the dense solver "
    "comes on top."
)


def page(found: record.Record) -> str:
    return record.page(
        "A matrix solved on its device", NAME, found, NOTE, record.table(found["rows"], form=".3g")
    )


main = record.script(NAME, __doc__, measure, page)

if __name__ == "__main__":
    sys.exit(main())
