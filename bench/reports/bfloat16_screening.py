"""What screening rows in bfloat16 saves the list solver: counts on any machine, times where the CPU has bfloat16 units.

    python -m bench.reports.bfloat16_screening

Counts the rows that ``solve(FactorCost(...), solver=CandidateLists())`` reads at both precisions. Where the CPU has bfloat16 matrix
units, both are timed in turn. Elsewhere torch's bfloat16 product is hundreds of times too slow, so it is emulated: a
float32 product of the rounded factors, rounded to bfloat16. Products of two bfloat16 numbers are exact in float32, so only
the order of the sums differs. The time on a machine with the units is then predicted from the counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from bench.lib import record
from bench.lib.factor_pairs import FactorKind
from fastmatch.assignment import CandidateLists, FactorCost, solve
from fastmatch_kernels.row_topk import cpu as kernel

NAME = "bfloat16_screening"
RATES = {"ieee": (155e9, 175e9), "bf16": (900e9, 1000e9)}
"""FLOP/s of one core, least and most: half of what torch reached on two cores of a Xeon with AMX."""


def activations(n, samples, seed):
    """Return centred activations of two networks whose ReLU units read the same 12 features: low rank, uneven norms."""
    g = np.random.default_rng([seed, n, samples])
    features = g.standard_normal((samples, 12)) * np.geomspace(1, 0.1, 12)
    units = g.standard_normal((12, n))
    both = [features @ (units + noise * g.standard_normal(units.shape)) for noise in (0.0, 0.5)]
    both = [np.maximum(x + 0.3 * g.standard_normal(n), 0) for x in both]
    a, b = ((x - x.mean(0)).T.astype(np.float32) for x in both)
    return torch.from_numpy(a), torch.from_numpy(b[g.permutation(n)])


def has_units() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def emulated(a, b):
    """``upper_products`` in float32, as the module's docstring says."""
    left, right = a.float(), b.float()

    def fill(rows, columns, out):
        out.view(torch.bfloat16).copy_(left[rows] @ right[columns].T)

    return fill


class Ledger:
    """Counts rows and operations of the products of a solve, and the seconds spent in them."""

    def __init__(self):
        self.clear()
        lists, row_min = FactorCost._lists, FactorCost.row_min

        def counted(cost, v, k, rows, sign, precision):
            name = "float64" if cost.dtype == torch.float64 else precision
            self.rows[name] += len(rows)
            self.proof[name] += len(rows) if self.proving else 0
            return lists(cost, v, k, rows, sign, precision)

        def proving(cost, *given):
            self.proving = True
            return row_min(cost, *given)

        FactorCost._lists, FactorCost.row_min = counted, proving
        kernel.products = self.timed(kernel.products, lambda factors, *_: sum(a.shape[1] for a, _ in factors))
        screen = kernel.upper_products if has_units() else emulated
        kernel.upper_products = self.timed(screen, lambda a, b: a.shape[1])

    def clear(self):
        self.rows, self.proof = (dict.fromkeys(("ieee", "bf16", "float64"), 0) for _ in range(2))
        self.work, self.seconds, self.proving = {"ieee": 0.0, "bf16": 0.0}, 0.0, False

    def timed(self, products, depth):
        def make(*given):
            begin = time.perf_counter()
            fill, e = products(*given), depth(*given)
            self.seconds += time.perf_counter() - begin

            def wrapped(rows, columns, out):
                name = "bf16" if out.dtype == torch.uint16 else "ieee"
                self.work[name] += 2.0 * out.numel() * e
                begin = time.perf_counter()
                fill(rows, columns, out)
                self.seconds += time.perf_counter() - begin

            return wrapped

        return make


def run(ledger, a, b, precision):
    """Solve once. Return the counts, the seconds, and the seconds outside of products."""
    ledger.clear()
    begin = time.perf_counter()
    found = solve(FactorCost([(a, b)], precision=precision), maximize=True, solver=CandidateLists())
    seconds = time.perf_counter() - begin
    if not found.gap <= found.gap_bound:
        raise AssertionError(f"{precision}: gap {found.gap}, allowed {found.gap_bound}")
    return {
        "objective": found.objective,
        "refills": int(found.stats["reads"]),
        "passes": {name: count / len(a) for name, count in ledger.rows.items()},
        "proof": {name: count / len(a) for name, count in ledger.proof.items()},
        "work": dict(ledger.work),
        "seconds": seconds,
        "rest": seconds - ledger.seconds,
    }


def predicted(counts):
    """Return the predicted seconds of the products: the mean of those at the lower and at the higher rates."""
    ends = [sum(counts["work"][name] / RATES[name][end] for name in RATES) for end in (0, 1)]
    return statistics.mean(ends)


def compare(ledger, name, a, b, repeats: int) -> Iterator[record.Row]:
    runs = [[run(ledger, a, b, precision) for precision in ("ieee", "bf16")] for _ in range(repeats)]
    plain, screened = runs[0]
    if abs(plain["objective"] - screened["objective"]) > 1e-11 * abs(plain["objective"]):
        raise AssertionError(f"{name}: {plain['objective']} in float32, {screened['objective']} screened")
    # The least of the repeats: other work only ever adds to it.
    rests = [min(pair[at]["rest"] for pair in runs) for at in (0, 1)]
    products = [predicted(x) for x in (plain, screened)]
    whole = [sum(x) for x in zip(products, rests, strict=True)]
    yield {
        "operation": "counts",
        "case": name,
        "passes, float32": plain["passes"]["ieee"],
        "passes in bfloat16": screened["passes"]["bf16"],
        "read again in float32": screened["passes"]["ieee"],
        "of which for the certificate": f"{screened['proof']['ieee']:.3f}",
        "in float64, float32 / bfloat16": " / ".join(
            f"{x['passes']['float64']:.3f}" for x in (plain, screened)
        ),
        "refills, float32 / bfloat16": " / ".join(str(x["refills"]) for x in (plain, screened)),
    }
    yield {
        "operation": "predicted",
        "case": name,
        "products, float32 (s)": f"{products[0]:.3f}",
        "products, bfloat16 (s)": f"{products[1]:.3f}",
        "products, speedup": products[0] / products[1],
        "rest, measured, float32 (s)": rests[0],
        "rest, measured, bfloat16 (s)": rests[1],
        "solve, speedup": whole[0] / whole[1],
        "speedup if products were free": whole[0] / rests[0],
    }
    if has_units():
        times = [statistics.median(pair[at]["seconds"] for pair in runs) for at in (0, 1)]
        yield {
            "operation": "measured",
            "case": name,
            "float32 (s)": times[0],
            "bfloat16 (s)": times[1],
            "speedup": times[0] / times[1],
        }


def cases(tiny: bool):
    """Yield a name and two factors for each case."""
    if tiny:
        kind = FactorKind("gaussian", 32)
        yield f"{kind}, n = 96", *kind.draw(96, seed=1)
        return
    for n, d in ((1024, 256), (2048, 256), (2048, 512), (8192, 512)):
        for kind in (FactorKind("gaussian", d), FactorKind("sibling", d, 3.0)):
            yield f"{kind}, n = {n}", *kind.draw(n, seed=1)
    for rank, level in ((256, 0.5), (256, 1.0), (32, 1.0)):
        kind = FactorKind("log-normal", rank, level)
        yield f"{kind}, n = 1024", *kind.draw(1024, seed=1)
    for d in (256, 512):
        yield f"activations of rank 12, d = {d}, n = 1024", *activations(1024, d, 1)


def measure(options: argparse.Namespace) -> record.Record:
    if not has_units():
        # On few and busy cores, the time outside of products would be mostly threads that wait for each other.
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ledger = Ledger()
    small = torch.eye(64)
    for precision in ("ieee", "bf16"):
        run(ledger, small, small, precision)  # compiles
    rows = (
        row for name, a, b in cases(options.tiny) for row in compare(ledger, name, a, b, options.repeats)
    )  # fmt: skip
    settings = {"matrix units": has_units(), "repeats": options.repeats, "rates": RATES}
    return record.record(rows, **settings)


def page(found: record.Record) -> str:
    settings = found["settings"]
    units = (
        "The CPU has bfloat16 matrix units."
        if settings["matrix units"]
        else "The CPU has no bfloat16 matrix units. Products in bfloat16 are emulated (float32 sums of the rounded factors, in "
        "another order), and nothing in bfloat16 is timed."
    )
    rates = {
        name: " to ".join(f"{rate / 1e9:.0f}" for rate in settings["rates"][key])
        for name, key in (("float32", "ieee"), ("bfloat16", "bf16"))
    }
    return record.page(
        "Screening rows in bfloat16", NAME, found,
        f"{units} A pass reads all rows once; a row that is read again counts with its share. The predicted times are of one core, "
        "and a prediction from counts is not a measurement. Products are predicted from the number of operations, Sinkhorn's "
        f"float32 products included, and one core's rates: {rates['float32']} GFLOP/s in float32 and {rates['bfloat16']} GFLOP/s "
        "in bfloat16, half of what torch reached on two cores of a Xeon with AMX in an earlier measurement (the mean of both "
        f"ends). Everything else was measured on one core of this machine, the least of {settings['repeats']} solves.",
        record.sections(found["rows"], by="operation"),
    )  # fmt: skip


main = record.script(NAME, __doc__, measure, page, repeats=(3, "solves of each case"))

if __name__ == "__main__":
    sys.exit(main())
