"""Assignment solvers side by side.

    python -m bench.reports.assignment_solvers

Each row is one instance. Every solver gets the same array in the same process; objectives are summed in float64 and
compared; the time is the median of the runs that fit the budget. A solver that takes more than a quarter of the budget is
not asked at the next size ("-"). Rows are kept one by one, so that a run of hours can be interrupted.

Part ``factor`` solves a cost of n x n entries that is never stored, and times the products of the same tiles alone.
Part ``stack`` solves many small problems by the solvers' batch functions.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.lib import record
from bench.lib.machine import processor
from bench.lib.peers import batch_solvers, solvers
from bench.lib.problems import problem, trained_gains
from fastmatch.assignment import CandidateLists, FactorCost, linear_sum_assignment, solve, solve_batched

NAME = "assignment_solvers"
PARTS = ("factor", "dense", "stack")
"""``factor`` comes first: peak memory is the process's."""
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
CACHE = Path(__file__).parents[2] / "out" / "bench"
KINDS = (
    "gaussian", "uniform", "factors 8", "factors 256", "factors 1024", "log-normal 8", "log-normal 32",
    "log-normal 256", "sibling 0", "sibling 1", "sibling 3", "dead", "ties",
)  # fmt: skip
OURS = "fastmatch"


def seconds_of(work, budget: float, max_runs: int = 5):
    """Return the median seconds and the last result of as many runs as fit the budget, at least one."""
    taken, result, begin = [], None, time.perf_counter()
    while len(taken) < max_runs and (not taken or time.perf_counter() - begin + taken[-1] < budget):
        start = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)), result


def dense_rows(options: argparse.Namespace) -> Iterator[record.Row]:
    """One row for each size and instance: every solver on the same matrix."""
    peers = {k: f for k, f in solvers()[0].items() if options.peers is None or k in options.peers}
    ours = {OURS: lambda cost: linear_sum_assignment(cost)[1]}
    for dtype in (np.float32, np.float64):
        linear_sum_assignment(np.random.default_rng(0).standard_normal((300, 300)).astype(dtype))  # compiles
    slow: set[tuple[str, str]] = set()
    for n in options.sizes:
        trained = trained_gains(n, CACHE) if n in (512, 2048) and not options.kinds else {}
        for kind in (*(options.kinds or KINDS), *trained):
            cost = trained[kind] if kind in trained else problem(kind, n, seed=1)
            asked = {k: f for k, f in {**ours, **peers}.items() if (kind, k) not in slow}
            row = dense_row(kind, cost, asked, options.budget)
            slow |= {(kind, k) for k, taken in row["seconds"].items() if taken > options.budget / 4}
            yield row


def dense_row(kind: str, cost: np.ndarray, asked: dict, budget: float) -> record.Row:
    n = len(cost)
    row: record.Row = {
        "part": "dense",
        "kind": kind,
        "n": n,
        "dtype": str(cost.dtype),
        "seconds": {},
        "wrong": {},
    }
    row["machine"] = processor()
    values = {}
    for name, solver in asked.items():
        row["seconds"][name], columns = seconds_of(lambda s=solver: s(cost), budget)
        values[name] = math.fsum(cost[np.arange(n), columns].astype(np.float64))
    found = solve(cost)
    row["gap"], row["gap_bound"], row["stats"] = found.gap, found.gap_bound, dict(found.stats)
    row["objective"] = values[OURS]
    size = math.fsum(np.abs(cost[found.row_ind, found.col_ind]).astype(np.float64))
    # A peer that is off by more than rounding is named, and is not compared in that row.
    row["wrong"] = {k: v - values[OURS] for k, v in values.items() if abs(v - values[OURS]) > 1e-9 * size}
    if found.gap > found.gap_bound or any(d < 0 for d in row["wrong"].values()):
        raise AssertionError(f"{kind} {n}: not optimal: {row}")
    others = {k: t for k, t in row["seconds"].items() if k != OURS and k not in row["wrong"]}
    if others:
        row["fastest"] = min(others, key=lambda k: others[k])
        row["ratio"] = others[row["fastest"]] / row["seconds"][OURS]
    return row


def factor_rows(n: int, d: int) -> Iterator[record.Row]:
    """One row for each kind of factors: solving by lists, against the products of the same tiles."""
    g = np.random.default_rng(2)
    for kind in ("independent", "sibling"):
        a, b = (g.standard_normal((n, d), np.float32) for _ in range(2))
        if kind == "sibling":
            b += a[g.permutation(n)]
        left, right = torch.from_numpy(a), torch.from_numpy(b)
        cost = FactorCost([(a, b)])
        solve(FactorCost([(a[:200], b[:200])]), maximize=True, solver=CandidateLists())  # compiles
        height, width = cost.tile
        start = time.perf_counter()
        for lo in range(0, n, height):
            for first in range(0, n, width):
                left[lo : lo + height] @ right[first : first + width].T
        product = time.perf_counter() - start
        start = time.perf_counter()
        found = solve(cost, maximize=True, solver=CandidateLists())
        taken = time.perf_counter() - start
        yield {
            "part": "factor", "kind": kind, "n": n, "d": d, "machine": processor(), "seconds": taken,
            "product_seconds": product, "ratio": taken / product, "gap": found.gap, "gap_bound": found.gap_bound,
            "stats": dict(found.stats), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip


def stack_row(batch: int, n: int) -> record.Row:
    """Many small problems, by every batch function."""
    stack = np.random.default_rng(3).standard_normal((batch, n, n)).astype(np.float32)
    solve_batched(stack[:2])
    seconds, values = {}, {}
    for name, solver in {OURS: solve_batched, **batch_solvers()}.items():
        solver(stack[:4])
        seconds[name], columns = seconds_of(lambda s=solver: s(stack), 20.0, 3)
        values[name] = float(np.take_along_axis(stack, columns[:, :, None], 2).astype(np.float64).sum())
    right = {k for k, x in values.items() if abs(x - values[OURS]) <= 1e-9 * abs(values[OURS])}
    if min(values.values()) < values[OURS] - 1e-9 * abs(values[OURS]):
        raise AssertionError(f"stack: not optimal: {values}")
    others = {k: t for k, t in seconds.items() if k != OURS and k in right}
    row: record.Row = {"part": "stack", "batch": batch, "n": n, "machine": processor(), "seconds": seconds}
    if others:
        row["fastest"] = min(others, key=lambda k: others[k])
        row["ratio"] = others[row["fastest"]] / seconds[OURS]
    return row


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    for part in (p for p in PARTS if p in options.parts):
        if part == "factor":
            yield from factor_rows(options.factor, 256)
        elif part == "dense":
            yield from dense_rows(options)
        else:
            yield stack_row(options.batch, 128)


def key(row: record.Row) -> tuple:
    """What a new measurement replaces."""
    if row["part"] == "dense":
        return ("dense", row["kind"], row["n"])
    return (row["part"], row.get("kind"))


def measure(options: argparse.Namespace) -> record.Record:
    """Measure the asked parts. Rows of earlier runs that are not measured again stay."""
    packages = solvers()[1]
    if options.tiny:
        options.sizes, options.kinds, options.factor, options.batch = [64], ["gaussian"], 300, 16
        return record.record(rows(options), packages=packages)
    found = record.record((), packages=packages)
    found["rows"] = record.read(NAME)["rows"] if record.exists(NAME) else []
    for row in rows(options):
        found["rows"] = [r for r in found["rows"] if key(r) != key(row)] + [row]
        record.write(NAME, found)
        print({k: v for k, v in row.items() if k != "stats"}, flush=True)
    return found


def dense_table(rows: list[record.Row], mark: dict[str, str]) -> str:
    names = list(dict.fromkeys(k for r in rows for k in r["seconds"]))
    lines = [
        "| instance | n | " + " | ".join(names) + " | fastest peer / fastmatch | reads of the matrix |",
        "|---" * (len(names) + 4) + "|",
    ]
    for r in rows:
        cells = [
            (f"{r['seconds'][k]:.4f}" + (" (wrong)" if k in r["wrong"] else "")) if k in r["seconds"] else "-"
            for k in names
        ]
        cells += [f"{r.get('ratio', math.nan):.2f}", f"{r['stats']['reads'] / r['n']:.2f}"]
        lines.append(f"| {r['kind']}{mark[r['machine']]} | {r['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def means(rows: list[record.Row]) -> Iterator[str]:
    """A sentence for each least size: the geometric mean of the ratios, and the least of them."""
    for least in (256, 512, 2048, 8192):
        ratios = [r["ratio"] for r in rows if r["n"] >= least and "ratio" in r]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield f"n >= {least}: geometric mean {mean:.2f}, least {min(ratios):.2f} ({len(ratios)} rows)."


def factor_table(rows: list[record.Row], mark: dict[str, str]) -> str:
    lines = [
        "| factor cost | n | d | seconds | the products alone | ratio | gap | gap_bound | peak MB |",
        "|---" * 9 + "|",
    ]
    lines += [
        f"| {r['kind']}{mark[r['machine']]} | {r['n']} | {r['d']} | {r['seconds']:.1f} | {r['product_seconds']:.1f} "
        f"| {r['ratio']:.2f} | {r['gap']:.1e} | {r['gap_bound']:.1e} | {r['peak_mb']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def page(found: record.Record) -> str:
    of = {part: [r for r in found["rows"] if r["part"] == part] for part in PARTS}
    # Rows may come from several runs. A ratio is always of one run; each row names its processor.
    processors = list(dict.fromkeys(r["machine"] for part in ("dense", "factor", "stack") for r in of[part]))
    mark = {name: "" if len(processors) == 1 else f" [{i}]" for i, name in enumerate(processors, 1)}
    parts = ["Other work on the machine counts in the load average."]
    if len(processors) > 1:
        parts.append("Rows measured on: " + ", ".join(f"{name}{mark[name]}" for name in processors) + ".")
    if of["dense"]:
        dense = sorted(of["dense"], key=lambda r: r["n"])
        parts += [dense_table(dense, mark), *means(dense)]
    if of["factor"]:
        parts.append(factor_table(of["factor"], mark))
    for r in of["stack"]:
        times = ", ".join(f"{k} {t:.2f} s" for k, t in r["seconds"].items())
        ratio = f"; fastest peer / fastmatch {r['ratio']:.2f}" if "ratio" in r else ""
        parts.append(f"{r['batch']} problems of {r['n']} x {r['n']}{mark[r['machine']]}: {times}{ratio}.")
    return record.page("Assignment solvers", NAME, found, *parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), help="n of the dense part")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that a solver may take for a row")
    parser.add_argument("--peers", nargs="*", help="ask only these: at large sizes most take minutes")
    parser.add_argument("--kinds", nargs="*", help="only these instances; rows of the others are kept")
    parser.add_argument("--factor", type=int, default=65536, help="n of the factor part")
    parser.add_argument("--batch", type=int, default=65536, help="problems of the stack part")
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
