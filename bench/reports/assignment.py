"""Assignment solvers side by side: ``python -m bench.reports.assignment run`` measures, ``report`` writes the table.

Each row is one instance: every solver gets the same array in the same process, the objective is summed in float64
and compared, and the time is the median of the runs that fit the budget. A solver over the budget at one size is not asked at
the next ("-"). Under ``factor`` a cost of n x n entries is solved without being stored, and timed against the
same tiles of products alone. Under ``stack`` many small problems are solved by the batch entry points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import time
from pathlib import Path

import numba
import numpy as np
import torch

from bench.lib.peers import batch_solvers, solvers
from bench.lib.problems import problem, trained_gains
from fastmatch.assignment import FactorCost, linear_sum_assignment, solve, solve_batched

RESULTS = Path(__file__).parents[1] / "results" / "assignment.json"
CACHE = Path(__file__).parents[2] / "out" / "bench"
KINDS = (
    "gaussian", "uniform", "factors 8", "factors 256", "factors 1024", "log-normal 8", "log-normal 32",
    "log-normal 256", "sibling 0", "sibling 1", "sibling 3", "dead", "ties",
)  # fmt: skip
OURS = "fastmatch"


def seconds_of(work, budget: float, most: int = 5):
    """(median seconds, last result): as many runs as fit the budget, one at least."""
    taken, result, begin = [], None, time.perf_counter()
    while len(taken) < most and (not taken or time.perf_counter() - begin + taken[-1] < budget):
        start = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)), result


def machine() -> dict:
    name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    return {
        "cpu": name or platform.processor(),
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__,
            "torch": torch.__version__, **solvers()[1],
        },
    }  # fmt: skip


def keep(kept: dict) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def dense_rows(
    sizes: list[int], budget: float, kept: dict, names: list[str] | None, kinds: list[str] | None
) -> list[dict]:
    peers = {k: f for k, f in solvers()[0].items() if names is None or k in names}
    ours = {OURS: lambda cost: linear_sum_assignment(cost)[1]}
    for dtype in (np.float32, np.float64):
        linear_sum_assignment(np.random.default_rng(0).standard_normal((300, 300)).astype(dtype))
    asked = kinds or KINDS
    rows = [r for r in kept.get("dense", []) if r["n"] not in sizes or (kinds and r["kind"] not in kinds)]
    kept["dense"] = rows
    out = set()
    for n in sizes:
        trained = trained_gains(n, CACHE) if n in (512, 2048) and not kinds else {}
        for kind in (*asked, *trained):
            cost = trained[kind] if kind in trained else problem(kind, n, seed=1)
            row = {"kind": kind, "n": n, "dtype": str(cost.dtype), "seconds": {}, "wrong": {}}
            row["machine"] = kept["machine"]["cpu"]
            values = {}
            for name, solver in {**ours, **peers}.items():
                if (kind, name) in out:
                    continue
                taken, cols = seconds_of(lambda s=solver, c=cost: s(c), budget)
                row["seconds"][name] = taken
                values[name] = math.fsum(cost[np.arange(n), cols].astype(np.float64))
                if taken > budget / 4:
                    out.add((kind, name))
            found = solve(cost)
            row["gap"], row["gap_bound"], row["stats"] = found.gap, found.gap_bound, dict(found.stats)
            row["objective"] = values[OURS]
            size = math.fsum(np.abs(cost[found.row_ind, found.col_ind]).astype(np.float64))
            # A peer off by more than rounding is named and is no competitor in that row.
            row["wrong"] = {
                k: v - values[OURS] for k, v in values.items() if abs(v - values[OURS]) > 1e-9 * size
            }
            if found.gap > found.gap_bound or any(d < 0 for d in row["wrong"].values()):
                raise AssertionError(f"{kind} {n}: not optimal: {row}")
            others = {k: t for k, t in row["seconds"].items() if k != OURS and k not in row["wrong"]}
            if others:
                row["fastest"] = min(others, key=lambda k: others[k])
                row["ratio"] = others[row["fastest"]] / row["seconds"][OURS]
            rows.append(row)
            keep(kept)
            print(kind, n, row.get("fastest"), f"{row.get('ratio', math.nan):.2f}", row["wrong"], flush=True)
    return rows


def factor_rows(n: int, d: int, cpu: str) -> list[dict]:
    rows = []
    g = np.random.default_rng(2)
    for kind in ("independent", "sibling"):
        a, b = (g.standard_normal((n, d), np.float32) for _ in range(2))
        if kind == "sibling":
            b += a[g.permutation(n)]
        left, right = torch.from_numpy(a), torch.from_numpy(b)
        cost = FactorCost([(a, b)])
        solve(FactorCost([(a[:200], b[:200])]), maximize=True, method="lists")
        height, width = cost.tile
        start = time.perf_counter()
        for lo in range(0, n, height):
            for first in range(0, n, width):
                left[lo : lo + height] @ right[first : first + width].T
        product = time.perf_counter() - start
        start = time.perf_counter()
        found = solve(cost, maximize=True, method="lists")
        taken = time.perf_counter() - start
        rows.append(
            {
                "kind": kind, "n": n, "d": d, "machine": cpu, "seconds": taken, "product_seconds": product, "ratio": taken / product,
                "gap": found.gap, "gap_bound": found.gap_bound, "stats": dict(found.stats),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def stack_row(batch: int, n: int, cpu: str) -> dict:
    stack = np.random.default_rng(3).standard_normal((batch, n, n)).astype(np.float32)
    solve_batched(stack[:2])
    seconds, values = {}, {}
    for name, solver in {OURS: solve_batched, **batch_solvers()}.items():
        solver(stack[:4])
        seconds[name], cols = seconds_of(lambda s=solver: s(stack), 20.0, 3)
        values[name] = float(np.take_along_axis(stack, cols[:, :, None], 2).astype(np.float64).sum())
    right = {k for k, x in values.items() if abs(x - values[OURS]) <= 1e-9 * abs(values[OURS])}
    if min(values.values()) < values[OURS] - 1e-9 * abs(values[OURS]):
        raise AssertionError(f"stack: not optimal: {values}")
    others = {k: t for k, t in seconds.items() if k != OURS and k in right}
    fastest = min(others, key=lambda k: others[k])
    row = {
        "batch": batch,
        "n": n,
        "machine": cpu,
        "seconds": seconds,
        "fastest": fastest,
        "ratio": others[fastest] / seconds[OURS],
    }
    print(row, flush=True)
    return row


def mean_ratio(rows: list[dict], least: int) -> float:
    ratios = [r["ratio"] for r in rows if r["n"] >= least and "ratio" in r]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def table(kept: dict) -> str:
    lines = [f"CPU {kept['machine']['cpu']}, {kept['machine']['cores']} cores, load average {kept['machine']['load']:.1f} at the start (other work on the machine counts in it). Versions: "
             + ", ".join(f"{k} {v}" for k, v in kept["machine"]["versions"].items()) + ".", ""]  # fmt: skip
    rows = sorted(kept.get("dense", []), key=lambda r: r["n"])
    # Rows may come from several sittings: a ratio is of one sitting always, the processor is said by row.
    processors = list(
        dict.fromkeys(r["machine"] for part in ("dense", "factor", "stack") for r in kept.get(part, []))
    )
    mark = {name: "" if len(processors) == 1 else f" [{i}]" for i, name in enumerate(processors, 1)}
    if len(processors) > 1:
        lines += ["Rows measured on: " + ", ".join(f"{name}{mark[name]}" for name in processors) + ".", ""]
    names = list(dict.fromkeys(k for r in rows for k in r["seconds"]))
    if rows:
        lines += ["| instance | n | " + " | ".join(names) + " | fastest peer / fastmatch | reads of the matrix |",
                  "|---" * (len(names) + 4) + "|"]  # fmt: skip
    for r in rows:
        cells = [
            (f"{r['seconds'][k]:.4f}" + (" (wrong)" if k in r["wrong"] else "")) if k in r["seconds"] else "-"
            for k in names
        ]
        reads = r["stats"]["reads"] / r["n"]
        lines.append(
            f"| {r['kind']}{mark[r['machine']]} | {r['n']} | "
            + " | ".join(cells)
            + f" | {r.get('ratio', math.nan):.2f} | {reads:.2f} |"
        )
    for least in (256, 512, 2048, 8192):
        ratios = [r["ratio"] for r in rows if r["n"] >= least and "ratio" in r]
        if ratios:
            lines += [
                "",
                f"n >= {least}: geometric mean {mean_ratio(rows, least):.2f}, least {min(ratios):.2f} ({len(ratios)} rows).",
            ]
    if kept.get("factor"):
        lines += [
            "",
            "| factor cost | n | d | seconds | the products alone | ratio | gap | gap_bound | peak MB |",
            "|---" * 9 + "|",
        ]
        for r in kept["factor"]:
            lines.append(
                f"| {r['kind']}{mark[r['machine']]} | {r['n']} | {r['d']} | {r['seconds']:.1f} | {r['product_seconds']:.1f} | {r['ratio']:.2f} | {r['gap']:.1e} | {r['gap_bound']:.1e} | {r['peak_mb']:.0f} |"
            )
    for r in kept.get("stack", []):
        lines += ["", f"{r['batch']} problems of {r['n']} x {r['n']}{mark[r['machine']]}: "
                  + ", ".join(f"{k} {t:.2f} s" for k, t in r["seconds"].items())
                  + f"; fastest peer / fastmatch {r['ratio']:.2f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--parts", nargs="*", default=["dense", "factor", "stack"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds a solver may take for a row")
    parser.add_argument("--peers", nargs="*", help="ask only these: at large sizes most take minutes")
    parser.add_argument("--kinds", nargs="*", help="only these instances; the other rows stay")
    parser.add_argument("--factor", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=65536)
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.command == "run":
        kept["machine"] = machine()
        if "factor" in given.parts:  # first: peak memory is the process's
            kept["factor"] = factor_rows(given.factor, 256, kept["machine"]["cpu"])
        if "dense" in given.parts:
            dense_rows(given.sizes, given.budget, kept, given.peers, given.kinds)
        if "stack" in given.parts:
            kept["stack"] = [stack_row(given.batch, 128, kept["machine"]["cpu"])]
        keep(kept)
    RESULTS.with_suffix(".md").write_text(table(kept))


if __name__ == "__main__":
    main()
