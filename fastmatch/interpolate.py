"""Loss and accuracy along the straight line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch.batches import Forward, batches_of, check_module, default_forward, evaluating, split_batch
from fastmatch.merge import merge
from fastmatch.records import Table
from fastmatch.renorm import EndpointStatistics, renormalize_many

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "Scores", "Triangle", "evaluate", "interpolate", "score", "triangle"]


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


class Scores(NamedTuple):
    """Mean loss, and the shares of samples whose class comes first, and among the first five."""

    loss: float
    accuracy: float
    top5: float


def score(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Scores:
    """Loss, top-1 and top-5 of a classifier over one read of ``data``, in eval mode; arguments as :func:`evaluate`."""
    check_module(model, "model")
    total_loss, right, among, count = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in batches_of(data, "evaluation", progress=progress):
            targets = split_batch(batch)[1]
            if not isinstance(targets, torch.Tensor):
                raise ValueError("data: expected (inputs, targets) pairs to evaluate on, got inputs alone")
            output = forward(model, batch)
            targets = targets.to(output.device)
            total_loss += float(loss(output, targets)) * len(targets)
            right += int((output.argmax(dim=1) == targets).sum())
            best = output.topk(min(5, output.shape[1]), dim=1).indices
            among += int((best == targets[:, None]).sum())
            count += len(targets)
    if count == 0:
        raise ValueError("data: yielded no sample")
    return Scores(total_loss / count, right / count, among / count)


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> tuple[float, float]:
    """(mean loss, accuracy) of a classifier over one read of ``data``, in eval mode.

    Args:
        model: run as it is; its mode is put back after.
        data: a loader of (inputs, targets).
        loss: ``loss(output, targets)``, a mean over the batch.
        forward: how to run the model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    found = score(model, data, loss=loss, forward=forward, progress=progress)
    return found.loss, found.accuracy


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


@dataclass(frozen=True)
class Triangle:
    """Loss and accuracy at merges of three models.

    Attributes:
        weights: of the three models, one row a merge; corners included.
        scores: at each.
    """

    weights: tuple[tuple[float, float, float], ...]
    scores: tuple[Scores, ...]

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the corners' losses, mixed by the merge's weights (0 at least)."""
        corner = [self.scores[self.weights.index(c)].loss for c in _CORNERS]
        rises = (
            s.loss - sum(w * v for w, v in zip(row, corner, strict=True))
            for row, s in zip(self.weights, self.scores, strict=True)
        )
        return max(0.0, *rises)

    def table(self) -> Table:
        """A row a merge: ``a``, ``b``, ``c`` (weights), ``loss``, ``top-1``, ``top-5``."""
        return Table(
            tuple(
                {"a": a, "b": b, "c": c, "loss": s.loss, "top-1": s.accuracy, "top-5": s.top5}
                for (a, b, c), s in zip(self.weights, self.scores, strict=True)
            )
        )

    def plot(self, path: str | Path | None = None, *, metric: str = "loss", ax: Axes | None = None) -> Axes:
        """Draws the triangle as filled contours, to a file where ``path`` is given (needs matplotlib)."""
        if metric not in ("loss", "accuracy", "top5"):
            raise ValueError(f"metric: expected 'loss', 'accuracy' or 'top5', got {metric!r}")
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(figsize=(5, 4), layout="constrained").subplots()
        x = [b + c / 2 for _, b, c in self.weights]
        y = [c * 3**0.5 / 2 for _, _, c in self.weights]
        filled = ax.tricontourf(x, y, [getattr(s, metric) for s in self.scores], levels=12)
        ax.figure.colorbar(filled, ax=ax, label=metric)
        for name, (left, up) in zip("ABC", ((0, 0), (1, 0), (0.5, 3**0.5 / 2)), strict=True):
            ax.annotate(name, (left, up), fontweight="bold")
        ax.set_aspect("equal")
        ax.set_axis_off()
        if path is not None:
            ax.get_figure(root=True).savefig(path, dpi=150)  # pyright: ignore[reportOptionalMemberAccess]
        return ax


_CORNERS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def triangle(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    points: int = 5,
    renormalize: str | None = None,
    calibration: Iterable[Any] | None = None,
    statistics: EndpointStatistics | None = None,
    mode: str = "joint",
    samples: int | None = None,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Triangle:
    """Loss and accuracy over the triangle that three models span.

    Example:
        >>> found = fm.triangle([a, b_aligned, c_aligned], test_loader, points=7)
        >>> found.barrier, found.plot("triangle.png")

    Args:
        models: three classifiers of one architecture, aligned.
        data: a loader of (inputs, targets), read once a merge.
        points: positions on each side, corners included; the triangle has ``points (points + 1) / 2``.
        renormalize, calibration, statistics, mode, samples, loss, forward, progress: see :func:`interpolate`.
    """
    if len(models) != 3:
        raise ValueError(f"models: expected three, got {len(models)}")
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    if renormalize is not None and calibration is None:
        raise ValueError("renormalize: expected calibration data to renormalize a triangle")
    n = points - 1
    rows = [((n - i - j) / n, i / n, j / n) for i in range(points) for j in range(points - i)]
    inner = [row for row in rows if row not in _CORNERS]
    if renormalize is None:
        merges = (merge(models, row) for row in inner)
    else:
        assert calibration is not None
        merges = _renormalized(
            models, inner, calibration, renormalize, statistics, mode, samples, forward, progress
        )
    found = {
        row: score(model, data, loss=loss, forward=forward, progress=progress)
        for row, model in (*zip(_CORNERS, models, strict=True), *zip(inner, merges, strict=True))
    }
    return Triangle(tuple(rows), tuple(found[row] for row in rows))
