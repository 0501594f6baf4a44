"""What placing the groups first does for weight matching: objective, solves and loss barrier, pairs of trained networks.

Writes bench/results/placement.json and .md. Usage: python -m bench.reports.placement [PAIRS]
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastmatch as fm
from bench.lib.nets import mlp, vgg16
from fastmatch.matching.weights import match_weights
from fastmatch.studies import demo
from fastmatch.studies.digits import digits, train

RESULTS = Path(__file__).parents[1] / "results"

TRAINED: dict[str, Callable[[], nn.Module]] = {
    "MLP 3 x 256": lambda: demo.mlp(256),
    "MLP 3 x 1024": lambda: demo.mlp(1024),
    "conv 16": lambda: demo.conv_net(16, norm=False),
    "conv 16, BN": lambda: demo.conv_net(16, norm=True),
    "conv 32": lambda: demo.conv_net(32, norm=False),
    "conv 32, BN": lambda: demo.conv_net(32, norm=True),
}
DRAWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 3 x 512": (lambda: mlp(512), (2, 784)),
    "MLP 8 x 256": (lambda: mlp(256, depth=8), (2, 784)),
    "VGG16 at half width": (lambda: vgg16(0.5), (2, 3, 32, 32)),
}


def pairs(name: str, count: int) -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """Networks of seeds 2 k and 2 k + 1, trained on digits or as they were drawn."""
    result = []
    data, _ = digits()
    for k in range(count):
        models = []
        for seed in (2 * k, 2 * k + 1):
            torch.manual_seed(seed)
            if name in TRAINED:
                models.append(train(TRAINED[name](), data, epochs=10, seed=seed, lr=2e-3))
            else:
                models.append(DRAWN[name][0]().eval())
        example = data.inputs[:2] if name in TRAINED else torch.randn(DRAWN[name][1])
        result.append((*models, example))
    return result


def both_ways(
    one: nn.Module, two: nn.Module, x: torch.Tensor, with_barrier: bool
) -> dict[str, dict[str, float]]:
    spec, found = fm.PermutationSpec.trace(one, x), {}
    for how, start in (("identity", spec.identity()), ("placed", None)):
        matching = match_weights(one.state_dict(), two.state_dict(), spec, start=start, progress=False)
        found[how] = {"objective": matching.objective[-1], "solves": matching.solves}
        if with_barrier:
            aligned = fm.Alignment(matching.permutations, spec, matching).apply(two)
            curve = fm.interpolate(one, aligned, data=digits()[1], points=11, progress=False)
            found[how] |= {"barrier": curve.barrier, "accuracy_barrier": curve.accuracy_barrier}
    return found


def main(count: int = 5) -> None:
    rows: list[dict[str, Any]] = []
    for name in [*TRAINED, *DRAWN]:
        runs = [both_ways(*pair, name in TRAINED) for pair in pairs(name, count)]
        row: dict[str, Any] = {
            "network": name, "trained": name in TRAINED, "pairs": count,
            "objective_ratio": [r["placed"]["objective"] / r["identity"]["objective"] for r in runs],
        }  # fmt: skip
        for how in ("identity", "placed"):
            for key in runs[0][how].keys() - {"objective"}:
                row[f"{key}, {how}"] = statistics.mean(r[how][key] for r in runs)
        rows.append(row)
        print(row, flush=True)
    versions = {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    record = {"rows": rows, "machine": versions}
    (RESULTS / "placement.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "placement.md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """A row a network: how much higher placing ends, and solves and barriers either way."""
    lines = [
        "| network | weights | pairs | objective, placed / identity: mean (least) | solves, identity -> placed "
        "| loss barrier | accuracy barrier |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = row["objective_ratio"]
        cells = [
            row["network"], "trained" if row["trained"] else "as drawn", str(row["pairs"]),
            f"{statistics.mean(ratios):.3f} ({min(ratios):.3f})",
        ]  # fmt: skip
        for key, form in (("solves", "{:.0f}"), ("barrier", "{:.3f}"), ("accuracy_barrier", "{:.1%}")):
            both = [row.get(f"{key}, {how}") for how in ("identity", "placed")]
            cells.append(" -> ".join(form.format(x) for x in both) if both[0] is not None else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
