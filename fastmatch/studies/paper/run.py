"""The study: pairs of networks are measured, in several processes where asked; claims are judged; a report is written."""

from __future__ import annotations

import json
import os
import pickle
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastmatch._internal.files import writing
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.unfinished import unfinished
from fastmatch.studies.digits import Batches, digits
from fastmatch.studies.networks import NETWORKS
from fastmatch.studies.paper.claims import judge
from fastmatch.studies.paper.measure import SAMPLES, TABLES, Data, Pair, Rows, measure
from fastmatch.studies.paper.page import page
from fastmatch.studies.paper.report import picture, report

__all__ = ["run"]

WIDTHS, SEEDS = (1, 4), (0, 1, 2, 3, 4)


# parameters: progress is part of every long call
def run(
    out: str | Path = "study",
    *,
    data: tuple[Dataset[Any], Dataset[Any]] | None = None,
    networks: Sequence[str] | None = None,
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = SEEDS,
    points: int = 5,
    epochs: int | None = None,
    processes: int = 1,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Measure everything, judge the claims and write ``study.json``, ``.md``, ``.png`` and ``.html``.

    Args:
        out: a folder, which is created if missing. Files of an earlier run are replaced.
        data: (train, test) datasets of (image, label) samples, images (C, H, W) of at least 8 x 8, without a
            common image. They are read into memory. Default: scikit-learn's digits.
        networks: names of :data:`fastmatch.studies.networks.NETWORKS`. Default: all.
        widths: multiples of the base width.
        seeds: each seed trains one pair of every network and width. Verdicts need at least 5.
        points: positions on a curve; an odd number, so that one is the midpoint.
        epochs: of training; None takes each network's own number.
        processes: pairs measured side by side, each in a process with one thread: two cores take half the time so,
            and two threads for one pair hardly less than one. A script that asks for several calls this function
            below ``if __name__ == "__main__":``, because every process imports the script.
        progress: show bars; None shows them on a terminal.

    Returns:
        The record, as in ``study.json``.

    Raises:
        ValueError: an option or a dataset is not as described.
    """
    names = list(NETWORKS) if networks is None else list(networks)
    _check_options(names, widths, seeds, points, processes)
    processes = min(processes, len(names) * len(widths) * len(seeds))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    loaders = digits() if data is None else (_batches(data[0], "train"), _batches(data[1], "test"))
    _check_apart(*loaders)
    began, cpu = time.perf_counter(), _processor_seconds()
    record: dict[str, Any] = {
        "data": "scikit-learn digits" if data is None else f"{type(data[0]).__name__} given by the user",
        "samples": {"train": len(loaders[0].inputs), "test": len(loaders[1].inputs), "calibration": SAMPLES},
        "chance": float(loaders[1].targets.bincount().max()) / len(loaders[1].targets),
        "widths": sorted(widths), "seeds": list(seeds), "points": points,
        "machine": _machine(processes), **{table: [] for table in TABLES},
    }  # fmt: skip
    pairs = [
        Pair(name, width, seed, points, epochs, whole=width == max(widths))
        for name in names for width in sorted(widths) for seed in seeds
    ]  # fmt: skip
    measured = _measured(pairs, loaders, processes)
    for rows in progress_bar(measured, "networks", show=progress, total=len(pairs)):
        for table in rows:
            record[table] += rows[table]
    record["seconds"] = {
        "wall": round(time.perf_counter() - began, 1), "processor": round(_processor_seconds() - cpu, 1)
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


def _measured(pairs: list[Pair], loaders: Data, processes: int) -> Iterator[Rows]:
    """Yield the rows of every pair, in order."""
    if processes == 1:
        yield from (measure(pair, loaders) for pair in pairs)
        return
    sent = pickle.dumps(
        loaders
    )  # by value: torch would send tensors by shared memory, of which containers have little
    with unfinished(), ProcessPoolExecutor(processes, get_context("spawn"), _set_up, (sent,)) as pool:
        yield from pool.map(_measure_here, pairs)


_here: dict[str, Data] = {}
"""The data of a process of the pool: sent once, and not with every pair."""


def _set_up(loaders: bytes) -> None:
    torch.set_num_threads(1)
    _here["loaders"] = pickle.loads(loaders)


def _measure_here(pair: Pair) -> Rows:
    return measure(pair, _here["loaders"])


def _processor_seconds() -> float:
    """Return the processor time of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


def _check_options(
    names: list[str], widths: Sequence[int], seeds: Sequence[int], points: int, processes: int
) -> None:
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"networks: expected some of {list(NETWORKS)}; got {name!r}")
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points: expected an odd number of at least 3; got {points}")
    if processes < 1:
        raise ValueError(f"processes: expected at least 1; got {processes}")
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


def _machine(processes: int) -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "processes": processes, "threads": torch.get_num_threads() if processes == 1 else 1, "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


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
