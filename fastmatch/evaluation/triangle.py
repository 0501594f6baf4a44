"""Loss and accuracy over the triangle that three models span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import Forward, default_forward
from fastmatch.evaluation.curve import _renormalized
from fastmatch.evaluation.scores import Scores, score
from fastmatch.evaluation.table import Table
from fastmatch.merging.average import merge
from fastmatch.renorm import EndpointStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Triangle", "triangle"]


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
