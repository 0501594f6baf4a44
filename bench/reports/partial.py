"""Partial merging on digits: accuracy, parameters and FLOPs over start_at, for every rule.

Writes bench/results/partial.json, the table in docs/partial.md and docs/pictures/partial.png.
Usage: python -m bench.reports.partial [SEEDS]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

import fastmatch as fm
from bench.reports.assignment import machine
from fastmatch.merging.units import RULES
from fastmatch.studies.digits import digits, train

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench/results/partial.json"
PAGE, PICTURE = ROOT / "docs/partial.md", ROOT / "docs/pictures/partial.png"
NETWORK = "conv 16-16-32-32, linear 64, without norm"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def measure(seeds: int) -> list[dict]:
    """One record a seed, rule, start_at and renormalization."""
    training, test = digits()
    everything = [training.inputs]
    x, rows = test.inputs[:1], []
    for seed in range(seeds):
        pair = [train(network(2 * seed + k), training, epochs=20, seed=2 * seed + k, lr=2e-3) for k in (0, 1)]
        whole = fm.cost_of(pair[0], x)

        def note(
            model: nn.Module,
            rule: str,
            start_at: int | None,
            renormalized: str,
            seed: int = seed,
            whole: fm.Cost = whole,
        ) -> None:
            cost, (loss, accuracy) = fm.cost_of(model, x), fm.evaluate(model, test)
            rows.append({
                "seed": seed, "rule": rule, "start_at": start_at, "renormalized": renormalized, "loss": loss,
                "accuracy": accuracy, "parameters": cost.parameters / whole.parameters,
                "flops": cost.flops / whole.flops,
            })  # fmt: skip

        for model in pair:
            note(model, "one model", None, "-")
        note(fm.Ensemble(pair), "ensemble", None, "-")
        for rule in RULES:
            for start_at in range(6):
                found = fm.merge_partial(pair, x, training, rule=rule, start_at=start_at)
                note(found.model, rule, start_at, "-")
                if rule != "cca":
                    goals = found.endpoint_statistics(pair, everything)
                    note(fm.renormalize(found.model, goals, everything, "repair"), rule, start_at, "repair")
    return rows


def means(rows: list[dict]) -> dict[tuple, dict[str, float]]:
    """(rule, renormalized, start_at) -> means over seeds."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["rule"], row["renormalized"], row["start_at"]), []).append(row)
    values = ("accuracy", "loss", "parameters", "flops")
    return {key: {v: sum(r[v] for r in found) / len(found) for v in values} for key, found in cells.items()}


def table(record: dict) -> str:
    """The result as a Markdown table: mean accuracy over seeds, by rule and start_at."""
    found = means(record["rows"])
    starts = sorted({key[2] for key in found if key[2] is not None})
    lines = [
        "| `start_at` | " + " | ".join(map(str, starts)) + " |",
        "| --- | " + " | ".join("---" for _ in starts) + " |",
    ]
    for value in ("parameters", "flops"):
        name = "FLOPs" if value == "flops" else value
        cells = [f"{found['zip', '-', s][value]:.2f}" for s in starts]
        lines.append(f"| {name} of one model (all but cca) | " + " | ".join(cells) + " |")
    for rule, renormalized in dict.fromkeys(key[:2] for key in found if key[2] is not None):
        name = rule if renormalized == "-" else f"{rule}, {renormalized}"
        lines.append(
            f"| {name} | "
            + " | ".join(f"{found[rule, renormalized, s]['accuracy']:.1%}" for s in starts)
            + " |"
        )
    one, both = found["one model", "-", None], found["ensemble", "-", None]
    return "\n".join([
        *lines, "",
        f"One model: {one['accuracy']:.1%}. Ensemble: {both['accuracy']:.1%} at 2.00 times the cost. {NETWORK}; means over "
        f"{record['seeds']} pairs of networks.",
    ])  # fmt: skip


def draw(record: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = means(record["rows"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, value in zip(axes, ("parameters", "flops"), strict=True):
        for rule, renormalized in dict.fromkeys(key[:2] for key in found if key[2] is not None):
            points = [
                cell for key, cell in found.items() if key[:2] == (rule, renormalized) and key[2] is not None
            ]
            style = {"linestyle": "--", "marker": "x"} if renormalized != "-" else {"marker": "o"}
            label = rule if renormalized == "-" else f"{rule}, {renormalized}"
            ax.plot(
                [p[value] for p in points], [100 * p["accuracy"] for p in points], label=label,
                color=f"C{RULES.index(rule)}", markersize=4, **style,
            )  # fmt: skip
        for name in ("one model", "ensemble"):
            cell = found[name, "-", None]
            ax.plot(
                cell[value],
                100 * cell["accuracy"],
                "*",
                color="black" if name == "ensemble" else "grey",
                label=name,
            )
        ax.set_xlabel(f"{'FLOPs' if value == 'flops' else value} / one model's")
    axes[0].set_ylabel("test accuracy, %")
    axes[1].legend(fontsize="x-small")
    figure.savefig(PICTURE, dpi=110)


def main(seeds: int = 3) -> None:
    record = {"network": NETWORK, "seeds": seeds, "machine": machine(), "rows": measure(seeds)}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    page = PAGE.read_text()
    marked = re.compile(r"(<!-- partial table[^>]*-->\n).*?(<!-- end of partial table -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda m: m[1] + table(record) + "\n" + m[2], page))
    draw(record)
    print(table(record))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
