"""The assignment on every family of costs, beside every other solver.

    python -m bench.reports.assignment_families --sizes 300,1500 --shapes 1:1,1:2 --dtypes float64 --families "gains*"
    python -m bench.reports.assignment_families --sizes 300 --out mine.json --peers-from all.json

A row is one matrix. Solvers take turns on it, each in a process of its own; the figure is the median processor time. What
they return is checked: a peer that fails, or whose objective is above the best one by more than rounding, is noted and not
compared. Costs given by factors are solved as such by ours, and made a matrix first for the peers. A peer that takes over 20 times as long as the fastest has one turn, and is ended at 40 times and a second; it is
not asked about larger matrices of that family. ``--peers-from`` takes the peers' figures from an earlier run and measures only ours.

Where a peer is clearly faster, all solve the matrix again with its rows and columns in random order. That tells whether the order
that a formula gives them decides.

Size is that of the shorter side; a shape 1:1.001 has at least one column more than rows. Matrices beyond 2^27 entries are
left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from bench.lib import record
from bench.lib.families import DTYPES, FactorFamily, Factors, Family, select
from bench.lib.peers import peers
from bench.lib.timed_solves import OURS, Outcome, Runner

NAME = "assignment_families"
SIZES = (300, 1500)
SHAPES = ("1:1", "1:1.001", "1:2", "1:10")
LARGEST = 2**27
LARGEST_FLOAT = Fraction(sys.float_info.max)

SLOW = 20.0
"""A peer that takes this many times the fastest's seconds is not repeated."""

SPARE = 1.0
"""Processor seconds that a peer has in any case."""

TARGET = 1.2
"""Ratio of our seconds to the fastest peer's up to which a row is good."""

ROUNDING = {"float32": 1e-5, "float64": 1e-9, "int32": 1e-9, "factors": 1e-9}
"""Share of the sum of absolute values by which a peer's objective may be above the best."""


def sides(size: int, shape: str) -> tuple[int, int]:
    """Return rows and columns of a shape such as ``1:2``, whose shorter side is ``size``."""
    a, b = (float(part) for part in shape.split(":"))
    n, m = (round(size * part / min(a, b)) for part in (a, b))
    if a != b and n == m:
        n, m = (n, m + 1) if a < b else (n + 1, m)
    return n, m


class Measurement:
    """Our solver and its peers on one matrix after the other.

    Args:
        asked: the peers; None for all that are installed.
        limit: processor seconds that a solve may take.
        repeats: turns of each solver.
        earlier: rows whose peers' figures are taken, by their key. Then no peer is measured.
    """

    def __init__(
        self,
        asked: list[str] | None = None,
        limit: float = 20.0,
        repeats: int = 3,
        earlier: dict[tuple, record.Row] | None = None,
    ):
        self.peers = {k: p for k, p in peers().items() if earlier is None and (asked is None or k in asked)}
        self.runner = Runner(limit)
        self.repeats = repeats
        self.earlier = earlier or {}
        self.too_slow: set[tuple[str, str, str]] = set()

    def row(self, family: Family | FactorFamily, n: int, m: int, dtype: str, seed: int) -> record.Row:
        """Measure one matrix."""
        row: record.Row = {"family": family.name, "n": n, "m": m, "dtype": dtype, "seed": seed}
        cost = family(n, m, seed, dtype)
        self.runner.place(cost)
        skipped = [name for name in self.peers if (name, family.name, dtype) in self.too_slow]
        shown = np.broadcast_to(0.0, cost.shape) if isinstance(cost, Factors) else cost
        names = [name for name, peer in self.peers.items() if name not in skipped and peer.takes(shown)]
        first = self.first(names)
        self.too_slow |= {(k, family.name, dtype) for k, r in first.items() if r.failure == "limit"}
        before = self.earlier.get(key(row), {})
        objective = {k: r.objective for k, r in first.items() if not r.failure}
        best = min(
            [*objective.values(), *([Fraction(before["best"])] if before else [])], default=Fraction(0)
        )
        size = max([Fraction(before.get("size", 0)), *(r.size for r in first.values())])
        slack = Fraction(ROUNDING[dtype]) * size
        wrong = [k for k, value in objective.items() if value - best > slack and k != OURS]
        failed = {k: r.failure for k, r in first.items() if r.failure and k != OURS}
        seconds = {k: [r.seconds] for k, r in first.items() if r.seconds is not None}
        fastest = min((taken[0] for k, taken in seconds.items() if k != OURS and k not in wrong), default=0.0)
        again = [k for k in seconds if k == OURS or seconds[k][0] <= SLOW * fastest]
        for _ in range(self.repeats - 1):
            for name in again:
                taken = self.runner.run(name).seconds
                seconds[name] += [] if taken is None else [taken]
        medians = {k: statistics.median(taken) for k, taken in seconds.items()}
        row["seconds"] = medians | {k: v for k, v in before.get("seconds", {}).items() if k != OURS}
        row["earlier"] = [k for k in before.get("seconds", {}) if k != OURS]
        row["wrong"] = wrong or before.get("wrong", [])
        row["failed"] = before.get("failed", {}) | failed
        row["skipped"] = skipped or before.get("skipped", [])
        row["best"], row["size"] = str(best), str(size)
        row |= ours(first[OURS], best)
        row |= ratio(row)
        if row["ratio"] is not None and row["ratio"] > TARGET and not isinstance(cost, Factors) and names:
            row["shuffled"] = self.shuffled(cost, [k for k in again if k not in wrong], seed)
        return row

    def shuffled(self, cost: np.ndarray, names: list[str], seed: int) -> float | None:
        """Return our seconds over the fastest peer's, or over its limit, for the matrix with rows and columns in random order."""
        g = np.random.default_rng(seed)
        rows, columns = (g.permutation(size) for size in cost.shape)
        self.runner.place(np.ascontiguousarray(cost[rows][:, columns]))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.repeats):
            for name in sorted(seconds, key=lambda k: k != OURS):
                limit = 2 * SLOW * seconds[OURS][0] + SPARE if seconds[OURS] and name != OURS else None
                found = self.runner.run(name, limit)
                if found.seconds is not None:
                    seconds[name].append(found.seconds)
                elif found.failure == "limit" and limit is not None:
                    seconds[name].append(limit)  # it takes longer than that
        medians = {k: statistics.median(taken) for k, taken in seconds.items() if taken}
        return ratio({"seconds": medians, "wrong": []})["ratio"]

    def first(self, names: list[str]) -> dict[str, Outcome]:
        """Ask everyone once. A peer need not end that takes far longer than another one."""
        found = {OURS: self.runner.run(OURS)}
        limit = None
        for name in names:
            found[name] = self.runner.run(name, limit)
            peers = [r.seconds for k, r in found.items() if k != OURS and r.seconds is not None]
            limit = 2 * SLOW * min(peers) + SPARE if peers else None
        return found


def ours(found: Outcome, best: Fraction) -> record.Row:
    """Return what there is to say about our result: its gap, and its fault if it has one."""
    if found.failure or found.gap is None:
        return {"gap": None, "gap_bound": None, "fault": found.failure or "no gap"}
    gap, bound = found.gap
    fault = ""
    if not math.isfinite(bound):
        fault = (
            "" if found.size * 16 > LARGEST_FLOAT else "no bound"
        )  # sums overflow, and with them any bound
    elif found.objective - best > min(
        Fraction(bound) + Fraction(1e-12) * found.size, Fraction(1e-9) * found.size
    ):
        fault = "not optimal"
    elif not gap <= bound:
        fault = "gap above its bound"
    return {"gap": gap, "gap_bound": bound, "fault": fault}


def ratio(row: record.Row) -> record.Row:
    """Return the fastest peer that is right, and our seconds over its."""
    right = {k: t for k, t in row["seconds"].items() if k != OURS and k not in row["wrong"]}
    if not right or OURS not in row["seconds"]:
        return {"fastest": None, "ratio": None}
    fastest = min(right, key=lambda k: right[k])
    return {"fastest": fastest, "ratio": row["seconds"][OURS] / right[fastest]}


def key(row: record.Row) -> tuple:
    """What a new measurement of a row replaces."""
    return tuple(row[k] for k in ("family", "n", "m", "dtype", "seed"))


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    """Measure the asked families, smallest matrices first."""
    earlier = None
    if options.peers_from:
        earlier = {key(row): row for row in json.loads(Path(options.peers_from).read_text())["rows"]}
    measurement = Measurement(options.peers, options.limit, options.repeats, earlier)
    with measurement.runner:
        for size in sorted(options.sizes):
            for shape in options.shapes:
                n, m = sides(size, shape)
                if n * m > LARGEST:
                    print(f"{n} x {m} is left out: more than 2^27 entries", flush=True)
                    continue
                for dtype in options.dtypes:
                    for family in select(options.families):
                        if dtype in family.dtypes:
                            yield measurement.row(family, n, m, dtype, options.seed)


def line(row: record.Row) -> str:
    """Return a row as one line of text."""
    times = " ".join(f"{k}={t:.3g}" for k, t in row["seconds"].items())
    notes = [row["fault"].upper()] if row["fault"] else []
    notes += [f"{k} wrong" for k in row["wrong"]] + [f"{k}: {v}" for k, v in row["failed"].items()]
    shown = "   -  " if row["ratio"] is None else f"{row['ratio']:6.2f}"
    return f"{shown} {row['family']}, {row['n']} x {row['m']}, {row['dtype']}: {times} {'; '.join(notes)}"


def summary(found: list[record.Row]) -> list[str]:
    """Return sentences: how many rows, the worst, the mean, how many are above the target, faults."""
    ratios = [row["ratio"] for row in found if row["ratio"] is not None]
    faults = [row for row in found if row["fault"]]
    told = [f"{len(found)} matrices of {len({row['family'] for row in found})} families."]
    if ratios:
        mean = math.exp(-statistics.fmean(math.log(max(r, 1e-9)) for r in ratios))
        above = sum(r > TARGET for r in ratios)
        told.append(
            f"Our seconds over the fastest peer's: {max(ratios):.2f} at worst, above {TARGET} in {above} of "
            f"{len(ratios)}. Fastest peer over ours, geometric mean: {mean:.2f}."
        )
    orders = [row["shuffled"] for row in found if row.get("shuffled") is not None]
    if orders:
        told.append(
            f"{len(orders)} of those above were solved again with rows and columns in random order: "
            f"{sum(r > TARGET for r in orders)} are above {TARGET} then, {max(orders):.2f} at worst."
        )
    kinds = {
        fault: sum(row["fault"] == fault for row in faults)
        for fault in sorted({row["fault"] for row in faults})
    }
    told.append(
        "Faults: " + (", ".join(f"{count} {fault}" for fault, count in kinds.items()) or "none") + "."
    )
    return told


def measure(options: argparse.Namespace) -> record.Record:
    """Measure. Rows of the output file that are not measured again stay."""
    if options.tiny:
        options.sizes, options.shapes, options.repeats = [12], ["1:1", "2:1"], 1
    packages = [peer.package for peer in peers().values()]
    out = Path(options.out)
    kept = json.loads(out.read_text())["rows"] if out.exists() and not options.tiny else []
    found = record.record((), packages=packages, limit=options.limit, repeats=options.repeats)
    fresh: list[record.Row] = []
    for row in rows(options):
        fresh.append(row)
        print(line(row), flush=True)
        if len(fresh) % 20 == 0 and not options.tiny:
            save(out, found, kept, fresh)
    found["rows"] = merged(kept, fresh)
    print("\n".join(summary(fresh)), flush=True)
    if not options.tiny:
        save(out, found, kept, fresh)
    return found


def merged(kept: list[record.Row], fresh: list[record.Row]) -> list[record.Row]:
    """Return the rows of both; a fresh one replaces the kept one of its key."""
    return list(({key(row): row for row in kept} | {key(row): row for row in fresh}).values())


def save(out: Path, found: record.Record, kept: list[record.Row], fresh: list[record.Row]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**found, "rows": merged(kept, fresh)}, indent=1) + "\n")


def page(found: record.Record) -> str:
    """Return the page: the summary, a table by kind of matrix, then every row, worst ratios first."""
    every = found["rows"]
    groups = sorted({(row["dtype"], row["n"], row["m"]) for row in every})
    by_kind = []
    for dtype, n, m in groups:
        ratios = [
            r["ratio"]
            for r in every
            if (r["dtype"], r["n"], r["m"]) == (dtype, n, m) and r["ratio"] is not None
        ]
        if ratios:
            mean = math.exp(-statistics.fmean(map(math.log, ratios)))
            by_kind.append({
                "matrix": f"{n} x {m}, {dtype}", "families": len(ratios), "worst": max(ratios),
                f"above {TARGET}": sum(r > TARGET for r in ratios), "geometric mean of peer / ours": mean,
            })  # fmt: skip
    names = list(dict.fromkeys(k for row in every for k in row["seconds"]))
    ordered = sorted(every, key=badness, reverse=True)
    shown = [
        {"family": row["family"].replace("|", "\\|"), "matrix": f"{row['n']} x {row['m']}, {row['dtype']}"}
        | {"ours / fastest": row["ratio"] if row["ratio"] is not None else "-"}
        | {"in random order": "-" if row.get("shuffled") is None else row["shuffled"]}
        | {name: told(row, name) for name in names}
        | {"fault": row["fault"] or "-"}
        for row in ordered
    ]
    seconds = "Seconds of processor time."
    marked = sum(bool(row.get("earlier")) for row in every)
    if marked:
        seconds += f" Those with * were measured in an earlier run: some or all peers of {marked} matrices."
    parts = [*summary(every), record.table(by_kind), seconds, record.table(shown)]
    return record.page("The assignment on every family of costs", NAME, found, *parts)


def badness(row: record.Row) -> float:
    """Return what rows are ordered by: the ratio; above all where we have no time, below all where no peer has."""
    if row["ratio"] is not None:
        return row["ratio"]
    return -math.inf if OURS in row["seconds"] else math.inf


def told(row: record.Row, name: str) -> str:
    """Return a solver's cell: its seconds, or why there are none."""
    if name in row["seconds"]:
        mark = "*" if name in row.get("earlier", ()) else ""
        return f"{row['seconds'][name]:.3g}{mark}" + (" (wrong)" if name in row["wrong"] else "")
    if name in row["failed"]:
        return {"limit": "limit", "crash": "crash"}.get(row["failed"][name], "error")
    return "limit before" if name in row["skipped"] else "-"


def parser() -> argparse.ArgumentParser:
    def words(text: str) -> list[str]:
        return [word.strip() for word in text.split(",")]

    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--sizes", type=lambda text: [int(word) for word in words(text)], default=list(SIZES))
    found.add_argument(
        "--shapes", type=words, default=list(SHAPES), help="rows:columns, such as 1:1,1:2,10:1"
    )
    found.add_argument("--dtypes", type=words, default=list(DTYPES))
    found.add_argument("--families", default="*", help="a pattern of names; several with ; between them")
    found.add_argument("--peers", type=words, help="only these; all that are installed by default")
    found.add_argument("--peers-from", metavar="FILE", help="take the peers' figures from this record")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--limit", type=float, default=20.0, help="processor seconds that a solve may take")
    found.add_argument("--out", default=str(record.RESULTS / f"{NAME}.json"), help="where the record goes")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the page if the record is the committed one."""
    options = record.options(parser(), arguments)
    if not options.page:
        measure(options)
    if options.page or (not options.tiny and Path(options.out) == record.RESULTS / f"{NAME}.json"):
        record.write_page(NAME, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
