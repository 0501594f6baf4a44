"""The automatic choice of a renormalization against every method by name, on merges and pruned networks of digits.

python -m bench.reports.renormalization_choice
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

import fastmatch as fm
from bench.lib import record
from fastmatch.studies.digits import Batches, digits, train_new
from fastmatch.studies.networks import NETWORKS
from fastmatch.studies.pruning import global_magnitude, layer_magnitude

NAME = "renormalization_choice"
WIDTHS = (1, 2)
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
GLOBAL_SPARSITIES = (0.5, 0.7, 0.9)
CALIBRATION = 1024
NEAR, HARM = 0.01, 0.03
"""A choice is near the best within one point, and does harm more than three points below leaving the merge alone."""
CHANNEL_WISE = "auto, statistics"
"""The automatic choice with the endpoints' statistics in place of the models, which leave out least squares."""
METHODS: dict[str, Any] = {
    "repair": "repair",
    "rescale": "rescale",
    "reshift": "reshift",
    "reset": "reset",
    "least squares, joint": "least-squares",
    "least squares, sequential": fm.Renormalization("least-squares", mode="sequential"),
    "auto": "auto",
    CHANNEL_WISE: "auto",
}
CONVOLUTIONAL = ("VGG", "ResNet")
GRID = tuple(
    name for name, network in NETWORKS.items() if network.kind == "MLP" or network.kind in CONVOLUTIONAL
)
NEED_MODELS = ("least squares, joint", "least squares, sequential", "auto")
Cell = tuple[str, nn.Module, list[nn.Module]]


def cells(a: nn.Module, b: nn.Module, calibration: Batches) -> Iterator[Cell]:
    """Yield (what was done, the model to correct, its endpoints)."""
    example = calibration.inputs[:2]
    by_weights = fm.align(a, b, example, progress=False).apply(b)
    by_activations = fm.align(a, b, example, fm.ActivationMatching(calibration), progress=False).apply(b)
    for matched, other in (("naive", b), ("weights", by_weights), ("activations", by_activations)):
        yield f"merge, {matched}", fm.merge([a, other]), [a, other]
    for amount in SPARSITIES:
        yield f"pruned by layer, {amount}", layer_magnitude(a, amount), [a]
    for amount in GLOBAL_SPARSITIES:
        yield f"pruned globally, {amount}", global_magnitude(a, amount), [a]


def rows(networks: Sequence[str], widths: Sequence[int], seeds: Sequence[int]) -> Iterator[record.Row]:
    """One row for each network, width, seed and cell: the accuracy of every method and of the automatic choice."""
    training, test = digits()
    calibration = Batches(training.inputs[:CALIBRATION], training.targets[:CALIBRATION], 256)
    jobs = [(name, width, seed) for name in networks for width in widths for seed in seeds]
    for name, width, seed in jobs:
        network = NETWORKS[name]
        build = partial(network.make, width, (1, 8, 8), 10)
        a, b = (
            train_new(build, training, epochs=network.epochs, seed=100 * seed + k, progress=False)
            for k in (0, 1)
        )
        for what, model, endpoints in cells(a, b, calibration):
            statistics = fm.endpoint_statistics(endpoints, calibration, progress=False)
            weights = [1 / len(endpoints)] * len(endpoints)
            accuracy, chosen = {"none": fm.evaluate(model, test, progress=False)[1]}, {}
            for name_of_method, method in METHODS.items():
                if method == "reset" and network.norm != "BN":
                    continue
                given = (
                    endpoints if name_of_method in NEED_MODELS else None if method == "reset" else statistics
                )
                new = fm.renormalize(
                    model,
                    given,
                    calibration,
                    method,
                    weights=None if given is None else weights,
                    progress=False,
                )
                plan = fm.applied_plan(new)
                assert plan is not None
                chosen[name_of_method] = plan.method
                accuracy[name_of_method] = fm.evaluate(new, test, progress=False)[1]
            published = {}
            for method in ("repair", "rescale") if network.kind in CONVOLUTIONAL else ():
                options = fm.Renormalization(method, layers="published")
                new = fm.renormalize(model, statistics, calibration, options, weights=weights, progress=False)
                published[f"published layers, {method}"] = round(fm.evaluate(new, test, progress=False)[1], 4)
            yield {
                "network": name, "width": width, "seed": seed, "cell": what,
                "chosen": chosen["auto"], "chosen among channel-wise ones": chosen[CHANNEL_WISE],
                **published,
                **{f"accuracy, {m}": round(value, 4) for m, value in accuracy.items()},
            }  # fmt: skip


def _share(values: list[float], limit: float) -> str:
    return f"{sum(v <= limit + 1e-9 for v in values) / len(values):.1%}"


def _accuracies(row: record.Row) -> dict[str, float]:
    """Return method -> test accuracy of one cell."""
    return {k.removeprefix("accuracy, "): v for k, v in row.items() if k.startswith("accuracy, ")}


def _layer_sets(everything: list[record.Row]) -> list[str]:
    """Return the lines of a table: mean accuracies with all layers renormalized, and with the published ones."""
    lines = [
        '`layers="published"` renormalizes convolutions alone, without the stem and the shortcuts of a ResNet. Mean accuracies:',
        "",
        "| network | models | none | repair | repair, published layers | rescale | rescale, published layers |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = (
        "accuracy, none",
        "accuracy, repair",
        "published layers, repair",
        "accuracy, rescale",
        "published layers, rescale",
    )
    for name in dict.fromkeys(r["network"] for r in everything if "published layers, repair" in r):
        for kind in ("merge", "pruned"):
            chosen = [r for r in everything if r["network"] == name and r["cell"].startswith(kind)]
            cells = (f"{100 * sum(r[key] for r in chosen) / len(chosen):.1f}%" for key in keys)
            lines.append(f"| {name} | {'merges' if kind == 'merge' else kind} | {' | '.join(cells)} |")
    return lines


LEAST_SQUARES = ("least squares, joint", "least squares, sequential")


def _distances(rows: list[record.Row], method: str, without: Sequence[str] = ()) -> list[float]:
    """Return how far ``method`` is below the best fixed method in each cell, the methods ``without`` left out."""
    found = []
    for accuracy in map(_accuracies, rows):
        fixed = [v for m, v in accuracy.items() if not m.startswith("auto") and m not in without]
        if method in accuracy:
            found.append(max(fixed) - accuracy[method])
    return found


def _rules(rows: list[record.Row]) -> list[str]:
    """Return the lines of the table of all methods."""
    lines = [
        "| method | cells | within 1 point of the best of all | farthest below it | within 1 point of the best without least squares | "
        "farthest below it | largest loss against leaving alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in ("auto", CHANNEL_WISE, *(m for m in METHODS if not m.startswith("auto")), "none"):
        of_all, without = _distances(rows, method), _distances(rows, method, LEAST_SQUARES)
        if of_all:
            harm = [a["none"] - a[method] for a in map(_accuracies, rows) if method in a]
            lines.append(
                f"| {method} | {len(of_all)} | {_share(of_all, NEAR)} | {_points(of_all)} | {_share(without, NEAR)} | "
                f"{_points(without)} | {_points(harm)} |"
            )
    return lines


def _points(values: list[float]) -> str:
    return f"{100 * max(*values, 0.0):.1f}"


def _told(rows: list[record.Row], method: str, chosen: str, without: Sequence[str], best: str) -> str:
    """Return the rule for one automatic choice in words."""
    distances = _distances(rows, method, without)
    harmful = sum(a["none"] - a[method] > HARM + 1e-9 for a in map(_accuracies, rows))
    picked = Counter(r[chosen] for r in rows)
    return (
        f"`{method}` is within 1 point of the best of {best} in {sum(d <= NEAR + 1e-9 for d in distances)} of {len(rows)} cells, and "
        f"more than 3 points below leaving the model alone in {harmful}. It chose "
        + ", ".join(f"{m} in {n}" for m, n in picked.most_common())
        + "."
    )


def page(found: record.Record) -> str:
    """Return the report's page: the rule, every method under the same rule, and the cells where the choice fell short."""
    everything = found["rows"]
    lines = [
        f"{len(everything)} cells: {len({r['network'] for r in everything})} networks, widths "
        f"{', '.join(f'x{w}' for w in found['settings']['widths'])}, {found['settings']['seeds']} seeds; merges of three "
        f"matchings and pruned networks, calibrated on {CALIBRATION} training samples in joint mode (least squares in both). The best "
        "is the method with the highest test accuracy, `reshift` and leaving the model alone included. `auto` is given the endpoints, "
        f"`{CHANNEL_WISE}` their statistics, so that it cannot try least squares.",
        "",
        *_rules(everything),
        "",
        _told(everything, "auto", "chosen", (), "all methods"),
        "",
        _told(
            everything,
            CHANNEL_WISE,
            "chosen among channel-wise ones",
            LEAST_SQUARES,
            "all methods but least squares",
        ),
        "",
        "## Where the choice is more than 1 point below the best",
        "",
        "| network | width | seed | cell | chosen | best | points below |",
        "|---|---|---|---|---|---|---|",
    ]
    short = [
        (d, r) for d, r in zip(_distances(everything, "auto"), everything, strict=True) if d > NEAR + 1e-9
    ]
    for below, r in sorted(short, key=lambda pair: -pair[0]):
        fixed = {m: v for m, v in _accuracies(r).items() if not m.startswith("auto")}
        lines.append(
            f"| {r['network']} | x{r['width']} | {r['seed']} | {r['cell']} | {r['chosen']} | {max(fixed, key=fixed.__getitem__)} | "
            f"{100 * below:.1f} |"
        )
    lines += ["", "## All layers, and those of the paper's code", "", *_layer_sets(everything)]
    return record.page("The automatic choice of a renormalization", NAME, found, "\n".join(lines))


def measure(options: argparse.Namespace) -> record.Record:
    warnings.simplefilter("ignore", UserWarning)
    if options.tiny:
        return record.record(rows(["MLP"], [1], [0]), networks=["MLP"], widths=[1], seeds=1)
    found = rows(GRID, WIDTHS, range(options.seeds))
    return record.record(found, networks=list(GRID), widths=list(WIDTHS), seeds=options.seeds)


main = record.script(NAME, __doc__, measure, page, seeds=(3, "pairs of networks"))

if __name__ == "__main__":
    sys.exit(main())
