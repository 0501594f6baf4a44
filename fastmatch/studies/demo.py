"""The demo: pairs of networks trained on digits, aligned, merged and renormalized; one table and one picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmatch._internal.allowed import DEMO_WIDTHS
from fastmatch._internal.files import writing
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch._internal.unfinished import unfinished
from fastmatch.assignment import solve
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.evaluation.plots import framed
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.align import align
from fastmatch.matching.weights import WeightMatching
from fastmatch.renorm import endpoint_statistics
from fastmatch.renorm.options import Method
from fastmatch.studies.digits import LEARNING_RATE, Batches, digits, train
from fastmatch.studies.networks import mlp, vgg

__all__ = ["run"]

LINES = (
    ("not aligned", "-", "-"),
    ("aligned by weights", "weights", "-"),
    ("aligned by activations", "activations", "-"),
    ("and REPAIR", "activations", "repair"),
)
"""The lines of the picture: label, how the pair was matched, how it was renormalized."""

COLOURS = {
    "not aligned": "#8b949e",
    "aligned by weights": "#e08214",
    "aligned by activations": "#e08214",
    "and REPAIR": "#2a9d6f",
}

DARK: dict[Any, Any] = {
    "figure.facecolor": "#121416", "savefig.facecolor": "#121416", "axes.facecolor": "#121416",
    "text.color": "#e7e9eb", "axes.labelcolor": "#e7e9eb", "axes.edgecolor": "#a0a8b0", "xtick.color": "#a0a8b0",
    "ytick.color": "#a0a8b0", "grid.color": "#a0a8b0",
}  # fmt: skip
"""Colours of a picture for a dark page."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a network, how the pair was matched and renormalized, and the curve between the two."""

    network: str
    matched: str
    renormalized: str
    loss_barrier: float
    accuracy_barrier: float
    midpoint_loss: float
    midpoint_accuracy: float
    end_accuracy: float
    positions: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @classmethod
    def of(cls, network: str, matched: str, renormalized: str, curve: Curve) -> Row:
        """Build the row of one curve."""
        loss, accuracy = curve.midpoint
        ends = (curve.accuracy[0] + curve.accuracy[-1]) / 2
        return cls(
            network, matched, renormalized, curve.barrier, curve.accuracy_barrier, loss, accuracy, ends,
            curve.positions, curve.loss, curve.accuracy,
        )  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A network of the demo.

    Attributes:
        name: in the table.
        build: a new network.
        epochs: of training.
        methods: the renormalizations shown.
    """

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    methods: tuple[Method, ...]


def architectures(width: int) -> list[Architecture]:
    """Return the networks of the demo for MLPs of ``width`` units."""
    channels = min(max(width // 32, 4), 64)
    return [
        Architecture(f"MLP {width}", lambda: mlp(width), 20, ("repair", "rescale")),
        Architecture(f"conv {channels}, BN", lambda: vgg(channels, norm="BN"), 12, ("repair", "reset")),
        Architecture(f"conv {channels}", lambda: vgg(channels), 20, ("repair", "rescale")),
    ]


def run(
    width: int = 1024,
    out: str | Path = "out",
    *,
    seed: int = 0,
    points: int = 11,
    progress: bool | None = None,
) -> list[Row]:
    """Run the demo, print its table, and write ``demo.json`` and ``demo.png`` into ``out``.

    Args:
        width: units of the MLPs' hidden layers, 128 to 8192. The conv nets start with width / 32
            channels, 64 at most.
        out: a folder, which is created if missing. Files of an earlier run are replaced.
        seed: of initialisation and data order; the two networks of a pair use different seeds derived from it.
        points: positions on each curve.
        progress: show bars; None shows them on a terminal.

    Returns:
        The rows of the table.

    Raises:
        ValueError: ``width`` is out of range.
        ImportError: scikit-learn is not installed.
    """
    least, most = DEMO_WIDTHS
    if not least <= width <= most:
        raise ValueError(f"width: expected {least} to {most}; got {width}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = digits()
    rows: list[Row] = []
    pairs: list[tuple[Architecture, tuple[nn.Module, nn.Module], Stopwatch]] = []
    timings: dict[str, dict[str, float]] = {}
    with compiling(width):
        for architecture in architectures(width):
            watch = Stopwatch()
            pairs.append((architecture, train_pair(architecture, data[0], seed, watch, progress), watch))
    for architecture, pair, watch in pairs:
        rows += compare(architecture, pair, data, points, watch, progress)
        timings[architecture.name] = watch.seconds
    print(table(rows))
    record = {
        "width": width,
        "seed": seed,
        "data": "scikit-learn digits, 1348 train and 449 test samples",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "seconds": {**timings, "total": round(time.perf_counter() - started, 1)},
        "rows": [asdict(row) for row in rows],
    }
    with writing(out / "demo.json", force=True) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, out / "demo.png")
    print(f"\n{record['seconds']['total']} s; curves in {out / 'demo.png'}, numbers in {out / 'demo.json'}")
    return rows


def train_pair(
    architecture: Architecture, data: Batches, seed: int, watch: Stopwatch, progress: bool | None
) -> tuple[nn.Module, nn.Module]:
    """Train two networks that differ in initialisation and data order, side by side.

    Each has one thread: on layers this small, two threads for one network are hardly faster than one.
    """
    numbers = {"A": 1000 * seed, "B": 1000 * seed + 1}
    networks = []
    for number in numbers.values():
        torch.manual_seed(number)
        networks.append(architecture.build())

    stop = threading.Event()

    def go_on(*_: object) -> None:
        if stop.is_set():
            raise RuntimeError("the other network's training has ended early")

    def train_one(network: nn.Module, label: str) -> nn.Module:
        torch.set_num_threads(1)
        return train(
            network, data, epochs=architecture.epochs, seed=numbers[label], lr=LEARNING_RATE,
            title=f"training {architecture.name}, {label}", progress=progress,
        )  # fmt: skip

    threads = torch.get_num_threads()
    hooks = [network.register_forward_pre_hook(go_on) for network in networks]
    try:
        with watch("train A and B"), ThreadPoolExecutor(2) as side_by_side:
            try:
                trained = [
                    side_by_side.submit(train_one, *pair) for pair in zip(networks, numbers, strict=True)
                ]
                for ended in wait(trained, return_when=FIRST_EXCEPTION).done:
                    ended.result()
            except BaseException:  # an error, or Ctrl-C: the pool would wait for what still trains
                stop.set()
                raise
    finally:
        torch.set_num_threads(threads)
        for hook in hooks:
            hook.remove()
    return networks[0], networks[1]


@contextmanager
def compiling(width: int) -> Iterator[None]:
    """Compile the kernels that are needed in another process, while the networks train. They are kept on the disk.

    Where some are kept already, another process would take longer than what may be missing.
    """
    from fastmatch_kernels._numba.cache import folders

    if any(True for folder in folders() for _ in folder.glob("*.nbc")):
        yield
        return
    with unfinished():
        process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import compile_kernels; compile_kernels({width})"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
            process.wait()  # compiling the same once more would take longer
        finally:
            process.kill()
            process.wait()


def compile_kernels(width: int) -> None:
    """Compile what :func:`compare` needs, by comparing untrained networks on little data and solving both kinds of costs."""
    training, test = (Batches(part.inputs[:64], part.targets[:64], 32) for part in digits())
    for architecture in architectures(width):
        compare(
            architecture,
            (architecture.build(), architecture.build()),
            (training, test),
            3,
            Stopwatch(),
            progress=False,
        )
    for dtype in (np.float32, np.float64):
        costs = np.random.default_rng(0).standard_normal((256, 256)).astype(dtype)
        for matrix in (costs, costs[np.arange(256) // 4]):
            solve(matrix)


def compare(
    architecture: Architecture,
    pair: tuple[nn.Module, nn.Module],
    data: tuple[Batches, Batches],
    points: int,
    watch: Stopwatch,
    progress: bool | None,
) -> list[Row]:
    """Return the curves of a pair: naive, aligned by weights and by activations, and with each renormalization.

    Args:
        architecture: of both networks.
        pair: the trained networks.
        data: (train, test).
        points: positions on each curve.
        watch: notes the seconds of every step.
        progress: show bars.
    """
    (model_a, model_b), (train_data, test_data), name = pair, data, architecture.name
    naive = interpolate(model_a, model_b, test_data, points=points, progress=progress)
    rows = [Row.of(name, "-", "-", naive)]
    with watch("endpoint statistics"):
        measured = endpoint_statistics([model_a, model_b], train_data, progress=progress)
    matchers = {"weights": WeightMatching(), "activations": ActivationMatching(train_data)}
    for matched, matcher in matchers.items():
        with watch(f"align by {matched}"):
            alignment = align(model_a, model_b, train_data.inputs[:2], matcher, progress=progress)
        aligned = alignment.apply(model_b)
        curve = interpolate(model_a, aligned, test_data, points=points, progress=progress)
        rows.append(Row.of(name, matched, "-", curve))
        statistics = measured.permuted(None, alignment)
        for method in progress_bar(architecture.methods, f"{name}: renormalized curves", show=progress):
            with watch(f"{method} of {points - 2} merges, {matched}"):
                between = Renormalized(train_data, method, None if method == "reset" else statistics)
                curve = interpolate(model_a, aligned, test_data, points, between=between, progress=False)
            rows.append(Row.of(name, matched, method, curve))
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown, which also reads well on a terminal."""
    head = (
        "network",
        "matched by",
        "renormalized",
        "loss barrier",
        "acc. barrier",
        "acc. midpoint",
        "acc. ends",
    )
    cells = [head, tuple("-" * len(h) for h in head)]
    cells += [
        (
            r.network, r.matched, r.renormalized, f"{r.loss_barrier:.3f}", f"{100 * r.accuracy_barrier:.1f}%",
            f"{100 * r.midpoint_accuracy:.1f}%", f"{100 * r.end_accuracy:.1f}%",
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def draw(rows: list[Row], path: Path, *, dark: bool = False) -> None:
    """Draw loss and accuracy along lambda, a column per network: not aligned, aligned, and renormalized.

    Args:
        rows: of the table.
        path: a .png file; an existing one is replaced.
        dark: light lines on a dark ground.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.network for r in rows))
    with rc_context(DARK if dark else None):
        figure = Figure(figsize=(3.5 * len(names), 5.0), layout="constrained")
        panels = figure.subplots(2, len(names), sharex=True, squeeze=False)
        for column, name in enumerate(names):
            chosen = {
                label: row
                for label, matched, method in LINES
                for row in rows
                if (row.network, row.matched, row.renormalized) == (name, matched, method)
            }
            for ax, metric in zip(panels[:, column], ("loss", "accuracy"), strict=True):
                for label, row in chosen.items():
                    ax.plot(
                        row.positions, getattr(row, metric), marker=".", color=COLOURS[label], label=label,
                        linestyle="--" if label.endswith("weights") else "-",
                    )  # fmt: skip
            first, last = chosen[LINES[0][0]], chosen[LINES[-1][0]]
            framed(panels[0][column], f"{name}: barrier {first.loss_barrier:.2f} → {last.loss_barrier:.3f}")
            middle = [f"{100 * row.midpoint_accuracy:.1f}%" for row in (first, last)]
            framed(panels[1][column], f"average of both: {middle[0]} → {middle[1]}")
            panels[1][column].set_xlabel("λ  (0 = A, 1 = B)")
        panels[0][0].set_ylabel("test loss")
        panels[1][0].set_ylabel("test accuracy")
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False
        )
        with writing(path, force=True) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
