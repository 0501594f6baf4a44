"""Weight matching from the greedy initialization against the identity: objective, solves and barriers.

    python -m bench.reports.greedy_initialization

Pairs of networks that are trained on digits, or randomly initialized. docs/design/matching.md includes the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

import fastmatch as fm
from bench.lib import record
from bench.lib.nets import mlp, vgg16
from fastmatch.matching.weights import WeightMatching
from fastmatch.studies import networks
from fastmatch.studies.digits import digits, train

NAME = "greedy_initialization"

TRAINED: dict[str, Callable[[], nn.Module]] = {
    "MLP 3 x 256": lambda: networks.mlp(256),
    "MLP 3 x 1024": lambda: networks.mlp(1024),
    "conv 16": lambda: networks.vgg(16),
    "conv 16, BN": lambda: networks.vgg(16, norm="BN"),
    "conv 32": lambda: networks.vgg(32),
    "conv 32, BN": lambda: networks.vgg(32, norm="BN"),
}
UNTRAINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 3 x 512": (lambda: mlp(512), (2, 784)),
    "MLP 8 x 256": (lambda: mlp(256, depth=8), (2, 784)),
    "VGG16 at half width": (lambda: vgg16(0.5), (2, 3, 32, 32)),
}


def pairs(name: str, count: int) -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Return networks of seeds 2 k and 2 k + 1, trained on digits or randomly initialized, and example inputs."""
    result = []
    data, _ = digits()
    for k in range(count):
        models = []
        for seed in (2 * k, 2 * k + 1):
            torch.manual_seed(seed)
            if name in TRAINED:
                models.append(train(TRAINED[name](), data, epochs=10, seed=seed, lr=2e-3))
            else:
                models.append(UNTRAINED[name][0]().eval())
        example = data.inputs[:2] if name in TRAINED else torch.randn(UNTRAINED[name][1])
        result.append((*models, example))
    return result


def both_ways(
    one: nn.Module, two: nn.Module, x: torch.Tensor, with_barrier: bool
) -> dict[str, dict[str, float]]:
    spec, found = fm.PermutationSpec.trace(one, x), {}
    for how, matcher in (("identity", WeightMatching("identity")), ("greedy", WeightMatching())):
        matching = matcher.match(one, two, spec, progress=False)
        found[how] = {"objective": matching.objective[-1], "solves": matching.solves}
        if with_barrier:
            aligned = fm.Alignment(matching.permutations, spec, matching).apply(two)
            curve = fm.interpolate(one, aligned, data=digits()[1], points=11, progress=False)
            found[how] |= {"barrier": curve.barrier, "accuracy_barrier": curve.accuracy_barrier}
    return found


def rows(names: list[str], count: int) -> Iterator[record.Row]:
    for name in names:
        runs = [both_ways(*pair, name in TRAINED) for pair in pairs(name, count)]
        row: record.Row = {
            "network": name, "trained": name in TRAINED, "pairs": count,
            "objective_ratio": [r["greedy"]["objective"] / r["identity"]["objective"] for r in runs],
        }  # fmt: skip
        for how in ("identity", "greedy"):
            for key in runs[0][how].keys() - {"objective"}:
                row[f"{key}, {how}"] = statistics.mean(r[how][key] for r in runs)
        yield row


def measure(options: argparse.Namespace) -> record.Record:
    names = [next(iter(UNTRAINED))] if options.tiny else [*TRAINED, *UNTRAINED]
    return record.record(rows(names, 1 if options.tiny else options.pairs))


def table(found: record.Record) -> str:
    """One row for each network: how much higher the greedy start ends, and solves and barriers from either start."""
    lines = [
        "| network | weights | pairs | objective, greedy / identity: mean (least) | solves, identity -> greedy "
        "| loss barrier | accuracy barrier |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        ratios = row["objective_ratio"]
        cells = [
            row["network"], "trained" if row["trained"] else "untrained", str(row["pairs"]),
            f"{statistics.mean(ratios):.3f} ({min(ratios):.3f})",
        ]  # fmt: skip
        for key, form in (("solves", "{:.0f}"), ("barrier", "{:.3f}"), ("accuracy_barrier", "{:.1%}")):
            both = [row.get(f"{key}, {how}") for how in ("identity", "greedy")]
            cells.append(" -> ".join(form.format(x) for x in both) if both[0] is not None else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


main = record.script(NAME, __doc__, measure, table, pairs=(5, "pairs of each network"))

if __name__ == "__main__":
    sys.exit(main())
