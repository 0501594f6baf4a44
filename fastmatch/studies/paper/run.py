"""The study's measurements: pairs are trained, matched, merged and renormalized; pruning; planted permutations.

Renormalization and activation matching read the first :data:`SAMPLES` training samples; every accuracy, variance and
feature is measured on test samples, which no training sample is among.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastmatch._internal.files import writing
from fastmatch._internal.modules import copy_module
from fastmatch._internal.progress import progress_bar
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
from fastmatch.studies.digits import Batches, digits, train, train_new
from fastmatch.studies.networks import NETWORKS, Network, StudyMethod
from fastmatch.studies.paper.claims import judge
from fastmatch.studies.paper.page import page
from fastmatch.studies.paper.report import picture, report
from fastmatch.studies.pruning import accuracy_by_sparsity

__all__ = ["run"]

SAMPLES = 512
"""Calibration samples, from the front of the training set."""
WIDTHS, SEEDS = (1, 4), (0, 1, 2, 3, 4)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
STARTS = (0, 1, 2)
"""Groups before which layers are kept apart, in the partial merges of plain networks."""
TABLES = ("curves", "layers", "pruning", "planted", "partial", "modes")
Data = tuple[Batches, Batches]


def run(
    out: str | Path = "study",
    *,
    data: tuple[Dataset[Any], Dataset[Any]] | None = None,
    networks: Sequence[str] | None = None,
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = SEEDS,
    points: int = 5,
    epochs: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure everything, judge the claims and write ``study.json``, ``.md``, ``.png`` and ``.html``.

    Args:
        out: a folder, which is created if missing. Files of an earlier run are replaced.
        data: (train, test) datasets of (image, label) samples, images (C, H, W) of at least 8 x 8, without a
            common image. They are read into memory. Default: scikit-learn's digits.
        networks: names of :data:`fastmatch.studies.networks.NETWORKS`. Default: all.
        widths: multiples of the base width.
        seeds: each seed trains one pair of every network and width. Verdicts need at least 3.
        points: positions on a curve; an odd number, so that one is the midpoint.
        epochs: of training; None takes each network's own number.
        progress: show bars; None shows them on a terminal.

    Returns:
        The record, as in ``study.json``.

    Raises:
        ValueError: an option or a dataset is not as described.
    """
    names = list(NETWORKS) if networks is None else list(networks)
    _check_options(names, widths, seeds, points)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loaders = digits() if data is None else (_batches(data[0], "train"), _batches(data[1], "test"))
    _check_apart(*loaders)
    began, cpu = time.perf_counter(), time.process_time()
    record: dict[str, Any] = {
        "data": "scikit-learn digits" if data is None else f"{type(data[0]).__name__} given by the user",
        "samples": {"train": len(loaders[0].inputs), "test": len(loaders[1].inputs), "calibration": SAMPLES},
        "chance": float(loaders[1].targets.bincount().max()) / len(loaders[1].targets),
        "widths": sorted(widths), "seeds": list(seeds), "points": points, "mode": "sequential",
        "machine": _machine(), **{table: [] for table in TABLES},
    }  # fmt: skip
    jobs = [(name, width, seed) for name in names for width in sorted(widths) for seed in seeds]
    for name, width, seed in progress_bar(jobs, "networks", show=progress):
        pair = _pair(name, width, seed, loaders, epochs)
        for table, rows in _measure(NETWORKS[name], pair, loaders, record, width, seed).items():
            key = {
                "network": name, "kind": NETWORKS[name].kind, "norm": NETWORKS[name].norm, "width": width, "seed": seed,
            }  # fmt: skip
            record[table] += [{**key, **row} for row in rows]
    record["seconds"] = {
        "wall": round(time.perf_counter() - began, 1), "processor": round(time.process_time() - cpu, 1)
    }  # fmt: skip
    record = _rounded(record)
    record["claims"] = _rounded([asdict(claim) for claim in judge(record)])
    with writing(out / "study.json", force=True) as path:
        path.write_text(as_text(record))
    with writing(out / "study.md", force=True) as path:
        path.write_text(page(record))
    with writing(out / "study.png", force=True) as path:
        picture(record).savefig(path, dpi=110, format="png")
    with writing(out / "study.html", force=True) as path:
        path.write_text(report(record))
    return record


def _check_options(names: list[str], widths: Sequence[int], seeds: Sequence[int], points: int) -> None:
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"networks: expected some of {list(NETWORKS)}; got {name!r}")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points: expected an odd number of at least 3; got {points}")
    if not names or not widths or not seeds or min(widths) < 1 or len(set(widths)) < len(widths):
        raise ValueError(
            f"widths: expected different positive numbers (and some networks and seeds); got {widths}"
        )


def _check_apart(training: Batches, test: Batches) -> None:
    """Refuse test samples that are training samples: verdicts would be about what was seen."""
    seen = {image.numpy().tobytes() for image in training.inputs}
    common = sum(image.numpy().tobytes() in seen for image in test.inputs)
    if common:
        raise ValueError(
            f"data: expected test images apart from the training images; {common} of {len(test.inputs)} are the same"
        )


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def _measure(
    network: Network,
    pair: tuple[nn.Module, nn.Module],
    loaders: Data,
    record: dict[str, Any],
    width: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of one pair for each table; all but the curves at the largest width."""
    alignments = _alignments(pair, loaders[0])
    rows = {"curves": list(_curves(network, pair, alignments, loaders, record["points"]))}
    if width == max(record["widths"]):
        rows["layers"] = _layers(network, pair, alignments, loaders)
        rows["pruning"] = _pruning(pair[0], loaders)
        rows["planted"] = [_planted(pair[0], loaders[0], seed)]
        rows["modes"] = list(_modes(pair, alignments["weights"], loaders))
        if network.norm is None:
            rows["partial"] = list(_partial(pair, loaders))
    return rows


def _rounded(value: Any) -> Any:
    """Round to six significant digits, which keeps the committed file small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (tuple, list)) else value


def as_text(record: dict[str, Any]) -> str:
    """Return the record as JSON with one line per row."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _batches(dataset: Dataset[Any], argument: str) -> Batches:
    """Read a dataset of (image, label) samples into memory."""
    samples = [dataset[k] for k in range(len(dataset))]  # pyright: ignore[reportArgumentType]
    if not samples or not all(isinstance(s, (tuple, list)) and len(s) == 2 for s in samples):
        raise ValueError(f"data: expected (image, label) samples in the {argument} set")
    images = torch.stack([torch.as_tensor(image) for image, _ in samples]).float()
    if images.ndim != 4 or min(images.shape[2:]) < 8:
        raise ValueError(
            f"data: expected images (C, H, W) of at least 8 x 8 as tensors; got {tuple(images.shape[1:])}"
        )
    return Batches(images, torch.tensor([int(label) for _, label in samples]), 128)


def _pair(name: str, width: int, seed: int, loaders: Data, epochs: int | None) -> tuple[nn.Module, nn.Module]:
    """Train two networks of the same architecture that differ in initialisation and data order."""
    network = NETWORKS[name]
    data = loaders[0]
    shape, classes = tuple(data.inputs.shape[1:]), int(data.targets.max()) + 1

    def train_one(number: int) -> nn.Module:
        return train_new(
            lambda: network.make(width, shape, classes), data,
            epochs=epochs or network.epochs, seed=1000 * seed + number, progress=False,
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
