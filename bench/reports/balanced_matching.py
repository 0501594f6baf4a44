"""Weight matching of networks as they are against balanced copies: midpoints, and seconds.

    python -m bench.reports.balanced_matching

Pairs of networks without norms, trained on digits. In a second case the units of the second network are scaled at random,
which does not change its function.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import fastmatch as fm
from bench.lib import record
from bench.lib.nets import vgg16
from fastmatch.matching.balance import scaled_at_random
from fastmatch.studies import networks
from fastmatch.studies.digits import digits, train_new

NAME = "balanced_matching"
EPOCHS = 15
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 3 x 64": lambda: networks.mlp(64),
    "MLP 3 x 256": lambda: networks.mlp(256),
    "conv 8": lambda: networks.vgg(8),
    "conv 16": lambda: networks.vgg(16),
}
HOW = ("as they are", "balanced match", "balanced match and merge")
"""The balanced match is applied to the networks as they are, or to their balanced copies."""


def midpoints(one: nn.Module, two: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Return the test accuracy of the midpoint, alone and with REPAIR, for each way to match; and seconds."""
    data, test = digits()
    began = time.perf_counter()
    balanced = [fm.balance(model, x).model for model in (one, two)]
    found = {"seconds of balance": time.perf_counter() - began}
    began = time.perf_counter()
    plain = fm.align(one, two, x, verify=False, progress=False)
    found["seconds of match"] = time.perf_counter() - began
    other = fm.align(*balanced, x, verify=False, progress=False)
    for how, alignment, pair in zip(
        HOW, (plain, other, other), ((one, two), (one, two), balanced), strict=True
    ):
        ends = [pair[0], alignment.apply(pair[1])]
        merged = fm.merge(ends)
        repaired = fm.renormalize(merged, ends, data, "repair", progress=False)
        for name, model in ((how, merged), (f"{how}, repair", repaired)):
            found[name] = fm.evaluate(model, test, progress=False)[1]
    return found


def rows(names: list[str], count: int, epochs: int) -> Iterator[record.Row]:
    data, test = digits()
    x = data.inputs[:4]
    for name in names:
        for k in range(count):
            one, two = (
                train_new(NETWORKS[name], data, epochs=epochs, seed=2 * k + j, progress=False)
                for j in range(2)
            )
            ends = statistics.fmean(fm.evaluate(m, test, progress=False)[1] for m in (one, two))
            for scales, second in (("trained", two), ("scaled at random", scaled_at_random(two, x, seed=k))):
                yield {
                    "network": name,
                    "scales": scales,
                    "pair": k,
                    "ends": ends,
                    **midpoints(one, second, x),
                }


def large(scale: float) -> record.Row:
    """Return the seconds of a large network of random weights."""
    torch.manual_seed(0)
    one, two = (vgg16(scale).eval() for _ in range(2))
    x = torch.randn(2, 3, 32, 32)
    began = time.perf_counter()
    fm.balance(one, x)
    fm.balance(two, x)
    balanced = time.perf_counter()
    fm.align(one, two, x, verify=False, progress=False)
    matched = time.perf_counter()
    return {
        "network": f"VGG16 at {scale:g} of its width, untrained", "scales": "random",
        "seconds of balance": balanced - began, "seconds of match": matched - balanced,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> record.Record:
    names, pairs, epochs = list(NETWORKS), options.pairs, EPOCHS
    if options.tiny:
        names, pairs, epochs = names[:1], 1, 1

    def every() -> Iterator[record.Row]:
        yield from rows(names, pairs, epochs)
        if not options.tiny:
            yield large(0.5)

    return record.record(every(), pairs=pairs, epochs=epochs)


def table(found: record.Record) -> str:
    """Return means and standard deviations over pairs, in percent."""
    lines = [
        f"| network | scales of units | ends | {' | '.join(HOW)} | balanced less as they are, pair by pair | seconds: match, balance |",
        "|---" * (5 + len(HOW)) + "|",
    ]
    keys = ("network", "scales")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in found["rows"]):
        own = [r for r in found["rows"] if tuple(r[k] for k in keys) == key]
        seconds = ", ".join(
            f"{statistics.median(r[f'seconds of {what}'] for r in own):.2f}" for what in ("match", "balance")
        )
        if "ends" not in own[0]:
            lines.append(f"| {key[0]} | {key[1]} |" + " |" * (2 + len(HOW)) + f" {seconds} |")
            continue
        cells = [f"{statistics.fmean(r['ends'] for r in own):.1%}"]
        for how in HOW:
            alone, repaired = ([r[name] for r in own] for name in (how, f"{how}, repair"))
            cells.append(
                f"{statistics.fmean(alone):.1%} ± {_deviation(alone):.1%}; repair {statistics.fmean(repaired):.1%}"
            )
        gains = [100 * (r[HOW[1]] - r[HOW[0]]) for r in own]
        cells.append(", ".join(f"{g:+.1f}" for g in gains))
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def page(found: record.Record) -> str:
    settings = found["settings"]
    intro = (
        "Test accuracy of the midpoint of two networks without norms that are trained on digits: the mean and the standard deviation over "
        f"{settings['pairs']} pairs, and with REPAIR. `as they are`: `fm.align(a, b, x)`. `balanced match`: `fm.WeightMatching(balance=True)`, which "
        "compares balanced copies and merges the networks as they are. `balanced match and merge`: the balanced copies themselves. Networks whose "
        "units are `scaled at random` by 2 to the power of a normal number compute what they did.\n\n"
        "In the mean over pairs, balanced copies match as well or better before REPAIR, and alike with it; single pairs differ both ways. `balance` is off by "
        "default because of the last column: it traces both networks and proves in float64 what may be scaled, which takes many times "
        "the match. A merge is independent of scales only if the balanced copies themselves are merged."
    )
    return record.page("Weight matching of balanced copies", NAME, found, intro, table(found))


main = record.script(NAME, __doc__, measure, page, pairs=(5, "pairs of each network"))

if __name__ == "__main__":
    sys.exit(main())
