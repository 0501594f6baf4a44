"""What the study measures of one pair of networks, as rows of its tables.

Renormalization and activation matching read the first :data:`SAMPLES` training samples; every accuracy, variance and
feature is measured on test samples, which no training sample is among.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from fastmatch._internal.modules import copy_module
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.evaluation.layers import layer_table
from fastmatch.evaluation.scores import evaluate
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.align import align
from fastmatch.merging.average import merge
from fastmatch.merging.ensemble import model_cost
from fastmatch.merging.partial import merge_partial
from fastmatch.merging.unit_rules import Permute
from fastmatch.permutations.alignment import Alignment
from fastmatch.renorm import (
    EndpointStatistics,
    Renormalization,
    endpoint_statistics,
    renormalize,
)
from fastmatch.studies.digits import Batches, train, train_new
from fastmatch.studies.networks import NETWORKS, Network, StudyMethod
from fastmatch.studies.pruning import accuracy_by_sparsity

__all__ = ["SAMPLES", "TABLES", "Data", "Pair", "Rows", "measure"]

SAMPLES = 512
"""Calibration samples, from the front of the training set."""
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
STARTS = (0, 1, 2)
"""Groups before which layers are kept apart, in the partial merges of plain networks."""
TABLES = ("curves", "layers", "pruning", "planted", "partial", "modes")
Data = tuple[Batches, Batches]
Rows = dict[str, list[dict[str, Any]]]
"""Rows of each table."""


@dataclass(frozen=True)
class Pair:
    """Two networks to train, that differ in initialisation and data order, and what to measure of them.

    Attributes:
        name: of :data:`fastmatch.studies.networks.NETWORKS`.
        width: multiple of the base width.
        seed: of both trainings.
        points: positions on a curve.
        epochs: of training; None takes the network's own number.
        whole: measure every table; False measures curves alone.
    """

    name: str
    width: int
    seed: int
    points: int
    epochs: int | None
    whole: bool


def measure(pair: Pair, loaders: Data) -> Rows:
    """Train a pair and return the rows of each table."""
    network = NETWORKS[pair.name]
    models = _trained(pair, loaders[0])
    alignments = _alignments(models, loaders[0])
    rows = {"curves": list(_curves(network, models, alignments, loaders, pair.points))}
    if pair.whole:
        rows["layers"] = _layers(network, models, alignments, loaders)
        rows["pruning"] = _pruning(models[0], loaders)
        rows["planted"] = [_planted(models[0], loaders[0], pair.seed)]
        rows["modes"] = list(_modes(models, alignments["weights"], loaders))
        if network.norm is None:
            rows["partial"] = list(_partial(models, loaders))
    key = {
        "network": pair.name, "kind": network.kind, "norm": network.norm, "width": pair.width, "seed": pair.seed,
    }  # fmt: skip
    return {table: [{**key, **row} for row in rows[table]] for table in rows}


def _trained(pair: Pair, data: Batches) -> tuple[nn.Module, nn.Module]:
    network = NETWORKS[pair.name]
    shape, classes = tuple(data.inputs.shape[1:]), int(data.targets.max()) + 1

    def train_one(number: int) -> nn.Module:
        return train_new(
            lambda: network.make(pair.width, shape, classes), data,
            epochs=pair.epochs or network.epochs, seed=1000 * pair.seed + number, progress=False,
        )  # fmt: skip

    return train_one(0), train_one(1)


def _alignments(pair: tuple[nn.Module, nn.Module], data: Batches) -> dict[str, Alignment | None]:
    example = data.inputs[:2]
    calibration = Batches(data.inputs[:SAMPLES], data.targets[:SAMPLES], data.size)
    return {
        "naive": None,
        "weights": align(*pair, example, progress=False),
        "activations": align(*pair, example, ActivationMatching(calibration), progress=False),
    }


def _curves(
    network: Network,
    pair: tuple[nn.Module, nn.Module],
    alignments: dict[str, Alignment | None],
    loaders: Data,
    points: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every matching and renormalization; the endpoints are measured once for all rows."""
    a, b = pair
    measured = endpoint_statistics([a, b], loaders[0], samples=SAMPLES, progress=False)
    for matched, alignment in alignments.items():
        aligned = b if alignment is None else alignment.apply(b)
        statistics = measured.permuted(None, alignment)
        for method in (None, *network.methods):
            curve = _curve(method, a, aligned, statistics, loaders, points)
            yield {
                "matched": matched, "renormalized": method or "none",
                "positions": curve.positions, "loss": curve.loss, "top-1": curve.accuracy, "top-5": curve.top5,
                "loss barrier": curve.barrier, "accuracy barrier": curve.accuracy_barrier,
                "midpoint accuracy": curve.midpoint[1],
                "ends accuracy": (curve.accuracy[0] + curve.accuracy[-1]) / 2,
            }  # fmt: skip


def _curve(
    method: StudyMethod | None,
    a: nn.Module,
    b: nn.Module,
    statistics: EndpointStatistics,
    loaders: Data,
    points: int,
) -> Curve:
    train_data, test = loaders
    if method is None:
        return interpolate(a, b, test, points=points, progress=False)
    if method == "bias":

        def normalized(_merged: nn.Module, weights: tuple[float, ...]) -> nn.Module:
            return merge([a, b], weights, biases="normalize")

        return interpolate(a, b, test, points, between=normalized, progress=False)
    options = Renormalization(method, "sequential", SAMPLES)
    between = Renormalized(train_data, options, None if method == "reset" else statistics)
    return interpolate(a, b, test, points, between=between, progress=False)


def _layers(
    network: Network,
    pair: tuple[nn.Module, nn.Module],
    alignments: dict[str, Alignment | None],
    loaders: Data,
) -> list[dict[str, Any]]:
    """Compare every layer of the midpoint merges with the endpoints, on test samples."""
    a, b = pair
    models = {"a": a, "b": b}
    method = "reset" if network.norm == "BN" else "repair"
    for matched, alignment in alignments.items():
        aligned = b if alignment is None else alignment.apply(b)
        models[matched] = merge([a, aligned])
        if matched == "weights":
            options = Renormalization(method, "sequential", SAMPLES)
            ends = None if method == "reset" else [a, aligned]
            models[f"{matched}, renormalized"] = renormalize(
                models[matched], ends, loaders[0], options, progress=False
            )
    return list(layer_table(models, loaders[1], endpoints=["a", "b"], progress=False).rows)


def _pruning(dense: nn.Module, loaders: Data) -> list[dict[str, Any]]:
    table = accuracy_by_sparsity(
        dense, *loaders, sparsities=SPARSITIES, samples=SAMPLES, method="auto", progress=False
    )
    accuracy = evaluate(dense, loaders[1], progress=False)[1]
    return [{**row, "dense accuracy": accuracy} for row in table.rows]


def _modes(
    pair: tuple[nn.Module, nn.Module], alignment: Alignment | None, loaders: Data
) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of the weight-matched midpoint after REPAIR in each mode."""
    a, b = pair
    aligned = b if alignment is None else alignment.apply(b)
    merged = merge([a, aligned])
    statistics = endpoint_statistics([a, aligned], loaders[0], samples=SAMPLES, progress=False)
    for mode in ("joint", "sequential"):
        options = Renormalization("repair", mode, SAMPLES)
        new = renormalize(merged, statistics, loaders[0], options, progress=False)
        yield {"mode": mode, "accuracy": evaluate(new, loaders[1], progress=False)[1]}


def _partial(pair: tuple[nn.Module, nn.Module], loaders: Data) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of merges by activations that keep the first layers apart."""
    training, test = loaders
    calibration = Batches(training.inputs[:SAMPLES], training.targets[:SAMPLES], training.size)
    ends = fmean(evaluate(model, test, progress=False)[1] for model in pair)
    example = training.inputs[:2]
    one = model_cost(pair[0], example).parameters
    for start_at in STARTS:
        found = merge_partial(list(pair), example, Permute(calibration), start_at=start_at)
        yield {
            "start_at": start_at, "accuracy": evaluate(found.model, test, progress=False)[1], "ends accuracy": ends,
            "parameters": model_cost(found.model, example).parameters / one,
        }  # fmt: skip


def _planted(model: nn.Module, data: Batches, seed: int) -> dict[str, int]:
    """Train a copy for one more epoch, permute it at random, and count the units that weight matching restores wrongly."""
    copied = train(copy_module(model), data, epochs=1, seed=seed + 7, lr=1e-4, progress=False)
    found = align(model, copied, data.inputs[:2], progress=False)
    planted = Alignment(found.spec.random(torch.Generator().manual_seed(seed)), found.spec)
    back = planted.compose(align(model, planted.apply(copied), spec=found.spec, progress=False))
    return {
        "units": sum(map(len, back.permutations.values())), "moved": _moved(planted), "wrong": _moved(back)
    }  # fmt: skip


def _moved(alignment: Alignment) -> int:
    return sum(int((p != torch.arange(len(p))).sum()) for p in alignment.permutations.values())
