"""Partial merging on digits: accuracy, parameters and FLOPs against ``start_at``, for every rule.

    python -m bench.reports.partial_merging

Writes the table in docs/guides/partial-merging.md and docs/pictures/partial.png too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import fastmatch as fm
from bench.lib import record
from fastmatch.studies.digits import digits, train

ROOT = Path(__file__).parents[2]
NAME = "partial_merging"
PAGE, PICTURE = ROOT / "docs/guides/partial-merging.md", ROOT / "docs/pictures/partial.png"
MATCHED = {"permute": fm.Permute, "zip": fm.Zip, "cca": fm.CCA}
RULES = ("identity", *MATCHED)
NETWORK = "conv 16-16-32-32, linear 64, without norm"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def rows(seeds: int, rules: tuple[str, ...], starts: range) -> Iterator[record.Row]:
    """One row for each seed, rule, start_at and renormalization."""
    training, test = digits()
    everything = [training.inputs]
    x = test.inputs[:1]
    for seed in range(seeds):
        pair = [train(network(2 * seed + k), training, epochs=20, seed=2 * seed + k, lr=2e-3) for k in (0, 1)]
        whole = fm.model_cost(pair[0], x)

        def note(
            model: nn.Module,
            rule: str,
            start_at: int | None,
            renormalized: str,
            seed: int = seed,
            whole: fm.ModelCost = whole,
        ) -> record.Row:
            cost, (loss, accuracy) = fm.model_cost(model, x), fm.evaluate(model, test)
            return {
                "seed": seed, "rule": rule, "start_at": start_at, "renormalized": renormalized, "loss": loss,
                "accuracy": accuracy, "parameters": cost.parameters / whole.parameters,
                "flops": cost.flops / whole.flops,
            }  # fmt: skip

        for model in pair:
            yield note(model, "one model", None, "-")
        yield note(fm.Ensemble(pair), "ensemble", None, "-")
        for rule in rules:
            for start_at in starts:
                units = fm.Identity() if rule == "identity" else MATCHED[rule](training)
                found = fm.merge_partial(pair, x, units, start_at=start_at)
                yield note(found.model, rule, start_at, "-")
                if rule != "cca":
                    statistics = found.endpoint_statistics(pair, everything)
                    yield note(
                        fm.renormalize(found.model, statistics, everything, "repair"),
                        rule,
                        start_at,
                        "repair",
                    )


def means(rows: list[record.Row]) -> dict[tuple, dict[str, float]]:
    """(rule, renormalized, start_at) -> means over seeds."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault((row["rule"], row["renormalized"], row["start_at"]), []).append(row)
    values = ("accuracy", "loss", "parameters", "flops")
    return {key: {v: sum(r[v] for r in found) / len(found) for v in values} for key, found in cells.items()}


def table(found: record.Record) -> str:
    """The result as a Markdown table: mean accuracy over seeds, by rule and start_at."""
    cells_of = means(found["rows"])
    starts = sorted({key[2] for key in cells_of if key[2] is not None})
    lines = [
        "| `start_at` | " + " | ".join(map(str, starts)) + " |",
        "| --- | " + " | ".join("---" for _ in starts) + " |",
    ]
    for value in ("parameters", "flops"):
        name = "FLOPs" if value == "flops" else value
        cells = [f"{cells_of['zip', '-', s][value]:.2f}" for s in starts]
        lines.append(f"| {name} of one model (all but cca) | " + " | ".join(cells) + " |")
    for rule, renormalized in dict.fromkeys(key[:2] for key in cells_of if key[2] is not None):
        name = rule if renormalized == "-" else f"{rule}, {renormalized}"
        lines.append(
            f"| {name} | "
            + " | ".join(f"{cells_of[rule, renormalized, s]['accuracy']:.1%}" for s in starts)
            + " |"
        )
    one, both = cells_of["one model", "-", None], cells_of["ensemble", "-", None]
    return "\n".join([
        *lines, "",
        f"One model: {one['accuracy']:.1%}. Ensemble: {both['accuracy']:.1%} at 2.00 times the cost. {found['settings']['network']}; means over "
        f"{found['settings']['seeds']} pairs of networks.",
    ])  # fmt: skip


def draw(found: record.Record) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells_of = means(found["rows"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, value in zip(axes, ("parameters", "flops"), strict=True):
        for rule, renormalized in dict.fromkeys(key[:2] for key in cells_of if key[2] is not None):
            points = [
                cell
                for key, cell in cells_of.items()
                if key[:2] == (rule, renormalized) and key[2] is not None
            ]
            style = {"linestyle": "--", "marker": "x"} if renormalized != "-" else {"marker": "o"}
            label = rule if renormalized == "-" else f"{rule}, {renormalized}"
            ax.plot(
                [p[value] for p in points], [100 * p["accuracy"] for p in points], label=label,
                color=f"C{RULES.index(rule)}", markersize=4, **style,
            )  # fmt: skip
        for name in ("one model", "ensemble"):
            cell = cells_of[name, "-", None]
            ax.plot(
                cell[value],
                100 * cell["accuracy"],
                "*",
                color="black" if name == "ensemble" else "grey",
                label=name,
            )
        ax.set_xlabel(f"{'FLOPs' if value == 'flops' else value} / one model's")
    axes[0].set_ylabel("test accuracy, %")
    figure.suptitle("Partial merging: accuracy against size and cost", fontsize="medium")
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", frameon=False
    )
    figure.savefig(PICTURE, dpi=110)


def measure(options: argparse.Namespace) -> record.Record:
    if options.tiny:
        return record.record(rows(1, RULES[:1], range(1)), network=NETWORK, seeds=1)
    return record.record(rows(options.seeds, RULES, range(6)), network=NETWORK, seeds=options.seeds)


def page(found: record.Record) -> str:
    """Return the report's page. Update the table and the picture of the documentation."""
    text = PAGE.read_text()
    marked = re.compile(r"(<!-- partial table[^>]*-->\n).*?(<!-- end of partial table -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda m: m[1] + table(found) + "\n" + m[2], text))
    draw(found)
    return record.page("Partial merging on digits", NAME, found, table(found))


main = record.script(NAME, __doc__, measure, page, seeds=(3, "pairs of networks"))

if __name__ == "__main__":
    sys.exit(main())
