"""A matrix solved where it lies: how often lists suit it, what they read and bring to the host, what the host then does.

python -m bench.reports.stored          -> bench/results/stored.json, stored.md
python -m bench.reports.stored --tiny   at a small size, nothing written

Runs on the CPU, with the reading of rows (which a GPU would do) timed apart: what is left is the host's part. The time
of reading on a GPU is not known from this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.lib.problems import problem
from bench.reports.kernels import machine
from fastmatch.assignment import solve
from fastmatch.assignment.candidate_lists import try_lists
from fastmatch.assignment.device import StoredCost

RESULTS = Path(__file__).parents[1] / "results"


KINDS = ("uniform", "factors 256", "sibling 1", "log-normal 256", "ties", "constant")
"""Of bench/lib/problems.py."""


def instances(n):
    for kind in KINDS:
        yield kind, torch.from_numpy(problem(kind, n))
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, n, 2, generator=generator)
    yield "distances in the plane", torch.cdist(*points)
    yield "sorted rows", torch.rand(n, n, generator=generator).sort(1).values


class Timed(StoredCost):
    """Counts rows, rounds, numbers and seconds of what a GPU would read."""

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


def measure(kind, matrix):
    solve(matrix[:50, :50], method="shortlist")
    try_lists(StoredCost(matrix[:50, :50]), 1.0)  # compiled
    begin = time.perf_counter()
    dense = solve(matrix, method="shortlist")
    dense_seconds = time.perf_counter() - begin
    cost = Timed(matrix)
    begin = time.perf_counter()
    found = try_lists(cost, 1.0)
    host = time.perf_counter() - begin - cost.seconds
    if found is not None:
        total = float(matrix.double()[np.arange(len(matrix)), found[0]].sum())
        if abs(total - dense.objective) > dense.gap_bound + 1e-12 * abs(total):
            raise AssertionError(f"{kind}: {total} by lists, {dense.objective} by the dense solver")
    return {
        "cost": kind,
        "n": len(matrix),
        "lists": "suit" if found is not None else "given up",
        "passes over the matrix": cost.rows / len(matrix),
        "rounds": cost.rounds,
        "part that crosses": cost.numbers / matrix.numel(),
        "host s": host,
        "dense solver s": dense_seconds,
    }


def markdown(record):
    keys = list(record["rows"][0])
    lines = [
        "# A matrix solved where it lies",
        "",
        f"Written by `python -m bench.reports.stored`. {record['machine']} One run each, of {record['rows'][0]['n']} x "
        f"{record['rows'][0]['n']} float32. Rows are read on the CPU here, and that time is left out: "
        "on a GPU it is not known. Rounds are those in which rows are read; what crosses to the host are (index, cost) pairs, as a "
        "part of the matrix's entries. Where lists are given up, the matrix is copied and the dense solver takes its time too.",
        "",
        "| " + " | ".join(keys) + " |",
        "|" + "---|" * len(keys),
    ]
    for row in record["rows"]:
        cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small size, nothing written")
    options = parser.parse_args(arguments)
    rows = []
    for kind, matrix in instances(200 if options.tiny else 4096):
        rows.append(measure(kind, matrix))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    record = {"machine": machine(), "rows": rows}
    if not options.tiny:
        (RESULTS / "stored.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "stored.md").write_text(markdown(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
