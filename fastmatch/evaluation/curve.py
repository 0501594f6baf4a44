"""Loss and accuracy along the straight line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    check_module,
    default_forward,
)
from fastmatch.evaluation.scores import score
from fastmatch.evaluation.table import Table
from fastmatch.merging.average import merge
from fastmatch.renorm import EndpointStatistics, renormalize_many

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "interpolate"]


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at positions lambda of ``(1 - lambda) a + lambda b``.

    Attributes:
        positions: lambda, from 0 (model A) to 1 (model B).
        loss: mean loss at each.
        accuracy: share of samples classified right at each, 0 to 1.
        top5: share of samples whose class is among the five likeliest; empty where not measured.
    """

    positions: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    top5: tuple[float, ...] = ()

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the mean of the ends (0 at least; paper's loss barrier)."""
        return max(0.0, max(self.loss) - (self.loss[0] + self.loss[-1]) / 2)

    @property
    def accuracy_barrier(self) -> float:
        """Largest drop of the accuracy below the mean of the ends, 0 to 1."""
        return max(0.0, (self.accuracy[0] + self.accuracy[-1]) / 2 - min(self.accuracy))

    @property
    def midpoint(self) -> tuple[float, float]:
        """(loss, accuracy) at the position nearest to one half."""
        k = min(range(len(self.positions)), key=lambda i: abs(self.positions[i] - 0.5))
        return self.loss[k], self.accuracy[k]

    def table(self) -> Table:
        """A row a position: ``position``, ``loss``, ``top-1``, ``top-5``."""
        top5 = self.top5 or (float("nan"),) * len(self.positions)
        columns = zip(self.positions, self.loss, self.accuracy, top5, strict=True)
        return Table(tuple({"position": p, "loss": v, "top-1": a, "top-5": t} for p, v, a, t in columns))

    def plot(
        self,
        path: str | Path | None = None,
        *,
        metric: str = "loss",
        label: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draws the curve; into ``ax`` if given, and into the file ``path`` if given.

        Args:
            path: a .png, .svg or .pdf file to write; an existing one is replaced.
            metric: ``"loss"`` or ``"accuracy"``.
            label: the line's name in a legend.
            ax: matplotlib axes to draw into; new ones otherwise.

        Raises:
            ImportError: matplotlib is not installed (``pip install fastmatch[plot]``).
        """
        if metric not in ("loss", "accuracy"):
            raise ValueError(f"metric: expected 'loss' or 'accuracy', got {metric!r}")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("drawing needs matplotlib: pip install 'fastmatch[plot]'") from error
        if ax is None:
            ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
        ax.plot(self.positions, getattr(self, metric), marker=".", label=label)
        ax.set_xlabel("λ  (0 = A, 1 = B)")
        ax.set_ylabel(metric)
        if path is not None:
            figure = ax.get_figure(root=True)
            assert figure is not None
            figure.savefig(path, dpi=150)
        return ax


def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Any],
    *,
    points: int = 11,
    transform: Callable[[nn.Module, tuple[float, float]], nn.Module] | None = None,
    renormalize: str | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: EndpointStatistics | None = None,
    mode: str = "joint",
    samples: int | None = None,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Curve:
    """Loss and accuracy at ``points`` equally spaced models between A and B.

    Example:
        >>> curve = fm.interpolate(model_a, model_b_aligned, data=test_loader, points=11)
        >>> curve.barrier, curve.accuracy_barrier

    Args:
        model_a, model_b: classifiers of the same architecture.
        data: a loader of (inputs, targets), read once a point.
        points: number of positions, both ends included; 3 at least.
        transform: ``transform(merged, weights)`` gives the model to evaluate between the ends, such as a
            renormalized one; the ends are evaluated as they are.
        renormalize: a method of :func:`fastmatch.renormalize`, applied between the ends; all points are
            calibrated in one read, for the memory of all of them.
        calibration: the data to renormalize on; read once for the ends, once for the points.
        statistics: those of A and B, where they are measured already.
        mode, samples: of the renormalization.
        loss: ``loss(output, targets)``, a mean over the batch.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    if points < 3:
        raise ValueError(f"points: expected at least 3, got {points}")
    check_module(model_a, "model_a")
    check_module(model_b, "model_b")
    if renormalize is not None and (calibration is None or transform is not None):
        raise ValueError("renormalize: expected calibration data, and no transform, to renormalize a curve")
    positions = tuple(k / (points - 1) for k in range(points))
    pairs = [(1 - t, t) for t in positions[1:-1]]
    if renormalize is None:
        between = (merge([model_a, model_b], weights) for weights in pairs)  # one at a time
    else:
        assert calibration is not None
        between = _renormalized(
            [model_a, model_b], pairs, calibration, renormalize, statistics, mode, samples, forward, progress
        )
    scores = [score(model_a, data, loss=loss, forward=forward, progress=progress)]
    for model, weights in zip(between, pairs, strict=True):
        shown = model if transform is None else transform(model, weights)
        scores.append(score(shown, data, loss=loss, forward=forward, progress=progress))
    scores.append(score(model_b, data, loss=loss, forward=forward, progress=progress))
    return Curve(
        positions,
        tuple(s.loss for s in scores),
        tuple(s.accuracy for s in scores),
        tuple(s.top5 for s in scores),
    )


def _renormalized(
    models: Sequence[nn.Module],
    weights: Sequence[Sequence[float]],
    calibration: Iterable[Any],
    method: str,
    statistics: EndpointStatistics | None,
    mode: str,
    samples: int | None,
    forward: Forward,
    progress: bool | None,
) -> list[nn.Module]:
    """The merges at ``weights``, renormalized together."""
    merges = [merge(models, row) for row in weights]
    return renormalize_many(
        merges, statistics or models, calibration, method,
        mode=mode, samples=samples, forward=forward, progress=progress,
    )  # fmt: skip
