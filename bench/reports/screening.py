"""What screening rows in bfloat16 saves the list solver: counts on any machine, times where the CPU has the units.

    python -m bench.reports.screening          -> bench/results/screening.json, screening.md
    python -m bench.reports.screening --tiny     at one small size, nothing written

Rows read by ``solve(FactorCost(...), method="lists")`` are counted at both precisions. Where the CPU has bfloat16 matrix
units both are timed, in turn. Elsewhere torch's bfloat16 product is hundreds of times too slow to count with, so it is
emulated: a float32 product of the rounded factors, rounded to bfloat16. Products of two bfloat16 numbers are exact in
float32, so only the order of the sums differs. What a machine with the units would take is then PREDICTED from the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.reports.duals import label, pair
from bench.reports.kernels import machine, markdown
from fastmatch.assignment import FactorCost, solve
from fastmatch_kernels.row_topk import cpu as kernel

RESULTS = Path(__file__).parents[1] / "results"
RATES = {"ieee": (155e9, 175e9), "bf16": (900e9, 1000e9)}
"""Operations a second and core: half of what torch reached on two cores of a Xeon with AMX, 310 to 350 and 1,800 to 2,000."""


def activations(n, samples, seed):
    """Trained-like: two nets' ReLU units that look at the same dozen features, centred; low rank, uneven norms."""
    g = np.random.default_rng([seed, n, samples])
    features = g.standard_normal((samples, 12)) * np.geomspace(1, 0.1, 12)
    units = g.standard_normal((12, n))
    both = [features @ (units + noise * g.standard_normal(units.shape)) for noise in (0.0, 0.5)]
    both = [np.maximum(x + 0.3 * g.standard_normal(n), 0) for x in both]
    a, b = ((x - x.mean(0)).T.astype(np.float32) for x in both)
    return torch.from_numpy(a), torch.from_numpy(b[g.permutation(n)])


def has_units():
    told = torch.cpu.get_capabilities()
    return bool(told.get("amx_bf16") or told.get("avx512_bf16"))


def emulated(a, b):
    """As ``upper_products``, in float32: see above."""
    left, right = a.float(), b.float()

    def fill(rows, columns, out):
        out.view(torch.bfloat16).copy_(left[rows] @ right[columns].T)

    return fill


class Ledger:
    """Rows and operations of the products of a solve, and the seconds spent in them."""

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
    """What one solve counts, its seconds, and those outside of products."""
    ledger.clear()
    begin = time.perf_counter()
    found = solve(FactorCost([(a, b)], precision=precision), maximize=True, method="lists")
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
    """Seconds of the products at the published rates: between what the lower and the higher ones give."""
    ends = [sum(counts["work"][name] / RATES[name][end] for name in RATES) for end in (0, 1)]
    return statistics.mean(ends)


def compare(ledger, name, a, b, repeats):
    runs = [[run(ledger, a, b, precision) for precision in ("ieee", "bf16")] for _ in range(repeats)]
    plain, screened = runs[0]
    if abs(plain["objective"] - screened["objective"]) > 1e-11 * abs(plain["objective"]):
        raise AssertionError(f"{name}: {plain['objective']} in float32, {screened['objective']} screened")
    # The least of the repeats: neighbours only ever add to it.
    rests = [min(pair[at]["rest"] for pair in runs) for at in (0, 1)]
    products = [predicted(x) for x in (plain, screened)]
    whole = [sum(x) for x in zip(products, rests, strict=True)]
    yield {
        "operation": "counts",
        "case": name,
        "passes, ieee": plain["passes"]["ieee"],
        "passes in bf16": screened["passes"]["bf16"],
        "and again in float32": screened["passes"]["ieee"],
        "of these for the certificate": f"{screened['proof']['ieee']:.3f}",
        "in float64, ieee / bf16": " / ".join(f"{x['passes']['float64']:.3f}" for x in (plain, screened)),
        "refills, ieee / bf16": " / ".join(str(x["refills"]) for x in (plain, screened)),
    }
    yield {
        "operation": "PREDICTED, not measured",
        "case": name,
        "products, ieee (s)": f"{products[0]:.3f}",
        "products, bf16 (s)": f"{products[1]:.3f}",
        "products, times less": products[0] / products[1],
        "the rest as measured here, ieee (s)": rests[0],
        "the same, bf16 (s)": rests[1],
        "solve, times faster": whole[0] / whole[1],
        "at most, were products free": whole[0] / rests[0],
    }
    if has_units():
        times = [statistics.median(pair[at]["seconds"] for pair in runs) for at in (0, 1)]
        yield {
            "operation": "measured",
            "case": name,
            "ieee (s)": times[0],
            "bf16 (s)": times[1],
            "times faster": times[0] / times[1],
        }


def cases(tiny):
    if tiny:
        yield "gaussian, d = 32, n = 96", *pair(("gaussian", 32, 0.0), 96, 1)
        return
    for n, d in ((1024, 256), (2048, 256), (2048, 512), (8192, 512)):
        for kind in (("gaussian", d, 0.0), ("sibling", d, 3.0)):
            yield f"{label(kind)}, n = {n}", *pair(kind, n, 1)
    for kind in (("log-normal", 256, 0.5), ("log-normal", 256, 1.0), ("log-normal", 32, 1.0)):
        yield f"{label(kind)}, n = 1024", *pair(kind, 1024, 1)
    for d in (256, 512):
        yield f"activations of rank 12, d = {d}, n = 1024", *activations(1024, d, 1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one small size, nothing written")
    parser.add_argument("--repeats", type=int, default=3, help="solves of each")
    options = parser.parse_args(arguments)
    if not has_units():
        # On few and busy cores, what is no product would be mostly threads that wait for each other.
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ledger, rows = Ledger(), []
    small = torch.eye(64)
    for precision in ("ieee", "bf16"):
        run(ledger, small, small, precision)  # compiles
    for name, a, b in cases(options.tiny):
        for row in compare(ledger, name, a, b, options.repeats):
            rows.append(row)
            print(row, flush=True)
    if not options.tiny:
        units = "It has bfloat16 matrix units." if has_units() else (
            "It has NO bfloat16 matrix units: bfloat16 products are emulated (float32 sums of the rounded factors, another order "
            "of summation), nothing in bfloat16 is timed."
        )  # fmt: skip
        head = (
            f"{machine()} {units} A pass is one reading of all rows; a row read again counts with its part. PREDICTED, of one core: "
            "the operations of all products (Sinkhorn's, always float32, included) at half of the rates that torch reached on two "
            "cores of a Xeon with AMX in an earlier measurement, float32 310 to 350 GFLOP/s and bfloat16 1,800 to 2,000 (means of both "
            "ends); everything else as measured on one core of this machine, which is another one (the least of "
            f"{options.repeats} solves in turn). A prediction from counts is no measurement."
        )
        record = {"machine": head, "rates": RATES, "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "screening.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "screening.md").write_text(markdown(record, "Screening rows in bfloat16"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
