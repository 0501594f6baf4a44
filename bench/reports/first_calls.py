"""How long the first call of a process takes: with an empty numba cache, and with a filled one.

    python -m bench.reports.first_calls

Each measurement is a process of its own. Wall time and processor time are given: compilation runs on one thread, and on a
busy machine only the latter tells what it takes. What numba loads at its first function, whoever wrote it, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.lib import record

NAME = "first_calls"

CALLS = {
    "solve, float32 matrix": "A.solve(a)",
    "solve, float64 matrix": "A.solve(a.astype(np.float64))",
    "solve, small float32 matrix": "A.solve(a[:60, :60])",
    "solve_batched, float32": "A.solve_batched(a[None])",
    "solve, FactorCost by lists": "A.solve(A.FactorCost([(a[:60], a[:60])]), solver=A.CandidateLists())",
}

CODE = """
import json, time
import numpy as np, torch, numba
import fastmatch.assignment as A

@numba.njit(cache=True)
def empty(x):
    return x

empty(np.zeros(3, np.float32))
a = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
wall, cpu = time.perf_counter(), time.process_time()
{call}
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


def seconds(call: str, cache: str) -> list[float]:
    """Return the wall and the processor seconds of one call in a new process."""
    script = Path(cache) / "call.py"  # a file: functions of a string are not cached
    script.write_text(CODE.replace("{call}", call))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def rows(calls: dict[str, str]) -> Iterator[record.Row]:
    for name, call in calls.items():
        with tempfile.TemporaryDirectory() as cache:
            first = seconds(call, cache)
            later = sorted(seconds(call, cache) for _ in range(3))[1]
        row = {"call": name}
        for when, (wall, processor) in (("first", first), ("later", later)):
            row |= {f"{when} wall s": wall, f"{when} processor s": processor}
        yield row


def measure(options: argparse.Namespace) -> record.Record:
    return record.record(rows(dict(list(CALLS.items())[-1:]) if options.tiny else CALLS))


def page(found: record.Record) -> str:
    lines = [
        "| first call of a process | compiled: once per installation | from numba's cache: later processes |",
        "|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [f"{row[f'{k} wall s']:.2f} ({row[f'{k} processor s']:.2f})" for k in ("first", "later")]
        lines.append(f"| {row['call']} | {' | '.join(cells)} |")
    return record.page(
        "The first call of a process",
        NAME,
        found,
        "Seconds beyond imports, wall (processor).",
        "\n".join(lines),
    )


main = record.script(NAME, __doc__, measure, page)

if __name__ == "__main__":
    sys.exit(main())
