"""What the first calls cost: ``python -m bench.reports.start`` writes bench/results/start.md.

Each line is a process of its own with an empty numba cache, then again with the cache the first one left. Wall time and
processor time are given: compilation runs on one thread, and on a busy machine only the latter says what it takes.
"Beyond imports" leaves out what numba itself loads when it runs its first function, whoever wrote it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.reports.assignment import machine

RESULTS = Path(__file__).parents[1] / "results" / "start.json"

CALLS = {
    "solve, float32 matrix": "A.solve(a)",
    "solve, float64 matrix": "A.solve(a.astype(np.float64))",
    "solve, small float32 matrix": "A.solve(a[:60, :60])",
    "solve_batched, float32": "A.solve_batched(a[None])",
    "solve, FactorCost by lists": 'A.solve(A.FactorCost([(a[:60], a[:60])]), method="lists")',
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
    """(wall, processor) seconds of one call in a process of its own."""
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


def main() -> None:
    kept: dict = {"machine": machine(), "rows": {}}
    for name, call in CALLS.items():
        with tempfile.TemporaryDirectory() as cache:
            first = seconds(call, cache)
            later = sorted(seconds(call, cache) for _ in range(3))[1]
        kept["rows"][name] = {"first": first, "later": later}
        print(name, first, later, flush=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    found = kept["machine"]
    lines = [
        f"CPU {found['cpu']}, {found['cores']} cores, load average {found['load']:.1f} at the start. numba {found['versions']['numba']}, "
        f"Python {found['versions']['python']}. Seconds beyond imports, wall (processor).",
        "",
        "| first call of a process | compiled: once per installation | from numba's cache: later processes |",
        "|---|---|---|",
    ]
    for name, row in kept["rows"].items():
        cells = [f"{wall:.2f} ({cpu:.2f})" for wall, cpu in (row["first"], row["later"])]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
