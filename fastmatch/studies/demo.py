"""The demo: independently trained nets on digits, aligned, merged and renormalized; one table, one picture."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fastmatch._internal.files import writing
from fastmatch._internal.progress import progress_bar
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.align import align
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment
from fastmatch.renorm import endpoint_statistics
from fastmatch.studies.digits import Batches, digits, train

__all__ = ["MAX_WIDTH", "conv_net", "mlp", "run"]

MAX_WIDTH = 8192


def mlp(width: int) -> nn.Module:
    """Three hidden layers of ``width`` units on 8 x 8 images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def conv_net(width: int, *, norm: bool) -> nn.Module:
    """A small VGG: four 3 x 3 convolutions (batch norm or none), pooling, a flatten of 2 x 2 blocks, a classifier."""
    layers: list[nn.Module] = []
    channels = 1
    for k, out in enumerate((width, width, 2 * width, 2 * width)):
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(out)] if norm else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if k % 2 else []
        channels = out
    layers += [nn.Flatten(), nn.Linear(4 * channels, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Row:
    """One line of the table: a network, how it was matched, how it was renormalized, and its curve."""

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
        loss, accuracy = curve.midpoint
        ends = (curve.accuracy[0] + curve.accuracy[-1]) / 2
        return cls(
            network, matched, renormalized, curve.barrier, curve.accuracy_barrier, loss, accuracy, ends,
            curve.positions, curve.loss, curve.accuracy,
        )  # fmt: skip


def networks(width: int) -> dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]]:
    """Name -> (builder, epochs, renormalizations shown)."""
    channels = min(max(width // 32, 4), 64)
    return {
        f"MLP {width}": (lambda: mlp(width), 20, ("repair", "rescale")),
        f"conv {channels}, BN": (lambda: conv_net(channels, norm=True), 12, ("repair", "reset")),
        f"conv {channels}": (lambda: conv_net(channels, norm=False), 20, ("repair", "rescale")),
    }


def run(
    width: int = 1024,
    out: str | Path = "out",
    *,
    seed: int = 0,
    points: int = 11,
    progress: bool | None = None,
) -> list[Row]:
    """Runs the demo, prints its table and writes ``demo.json`` and ``demo.png`` into ``out``.

    Args:
        width: of the MLPs' hidden layers, 128 to 8192; the conv nets start with width / 32
            channels, 64 at most.
        out: a folder; made if missing, files of an earlier run are replaced.
        seed: of initialisation and data order; the two networks of a pair use different ones.
        points: positions on each curve.
        progress: show bars; None shows them on a terminal.
    """
    if not 128 <= width <= MAX_WIDTH:
        raise ValueError(f"width: expected 128 to {MAX_WIDTH}, got {width}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train_data, test_data = digits()
    rows: list[Row] = []
    timings: dict[str, dict[str, float]] = {}
    for name, (build, epochs, methods) in networks(width).items():
        clock: dict[str, float] = {}
        pair = []
        for k in range(2):
            torch.manual_seed(1000 * seed + k)
            begin = time.perf_counter()
            pair.append(
                train(build(), train_data, epochs=epochs, seed=1000 * seed + k, lr=2e-3,
                      title=f"training {name}, {'AB'[k]}", progress=progress)
            )  # fmt: skip
            clock[f"train {'AB'[k]}"] = time.perf_counter() - begin
        rows += compare(name, pair[0], pair[1], methods, train_data, test_data, points, clock, progress)
        timings[name] = {k: round(v, 3) for k, v in clock.items()}
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


def compare(
    name: str,
    model_a: nn.Module,
    model_b: nn.Module,
    methods: tuple[str, ...],
    train_data: Batches,
    test_data: Batches,
    points: int,
    clock: dict[str, float],
    progress: bool | None,
) -> list[Row]:
    """The curves of one pair: naive, aligned by weights and by activations, and with each renormalization."""
    example = train_data.inputs[:2]
    rows = [
        Row.of(name, "-", "-", interpolate(model_a, model_b, test_data, points=points, progress=progress))
    ]
    begin = time.perf_counter()
    measured = endpoint_statistics([model_a, model_b], train_data, progress=progress)
    clock["endpoint statistics"] = time.perf_counter() - begin
    for matched in ("weights", "activations"):
        begin = time.perf_counter()
        matcher = WeightMatching() if matched == "weights" else ActivationMatching(train_data)
        alignment: Alignment = align(model_a, model_b, example, matcher, progress=progress)
        clock[f"align by {matched}"] = time.perf_counter() - begin
        aligned = alignment.apply(model_b)
        rows.append(
            Row.of(
                name, matched, "-", interpolate(model_a, aligned, test_data, points=points, progress=progress)
            )
        )
        statistics = measured.permuted(None, alignment)
        for method in progress_bar(methods, f"{name}: renormalized curves", show=progress):
            begin = time.perf_counter()
            between = Renormalized(train_data, method, statistics)  # pyright: ignore[reportArgumentType]
            curve = interpolate(model_a, aligned, test_data, points, between=between, progress=False)
            clock[f"{method} of {points - 2} merges, {matched}"] = time.perf_counter() - begin
            rows.append(Row.of(name, matched, method, curve))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text, for a terminal and for Markdown alike."""
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


def draw(rows: list[Row], path: Path) -> None:
    """The loss along lambda, a panel per network and matching, a line per renormalization."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.network for r in rows))
    figure = Figure(figsize=(4.2 * len(names), 6.4), layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True, squeeze=False)
    colours = {
        "naive": "#888888",
        "aligned": "#d95f02",
        "repair": "#1b9e77",
        "rescale": "#7570b3",
        "reset": "#1f78b4",
    }
    for column, name in enumerate(names):
        for line, matched in enumerate(("weights", "activations")):
            ax = panels[line][column]
            for row in rows:
                if row.network != name or row.matched not in ("-", matched):
                    continue
                label = "naive" if row.matched == "-" else row.renormalized.replace("-", "aligned")
                ax.plot(
                    row.positions, row.loss, marker=".", color=colours[label],
                    label=label if label in ("naive", "aligned") else f"+ {label.upper()}",
                )  # fmt: skip
            ax.set_title(f"{name}: matched by {matched}", fontsize=10)
            ax.set_yscale("log")
            ax.grid(alpha=0.25, which="both")
            ax.legend(fontsize=8, loc="upper left")
            if column == 0:
                ax.set_ylabel("test loss")
            if line == 1:
                ax.set_xlabel("λ  (0 = A, 1 = B)")
    with writing(path, force=True) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
