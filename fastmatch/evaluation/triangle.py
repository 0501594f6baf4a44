"""Loss and scores over the triangle that three models span."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastmatch._internal.allowed import LEAST_ON_A_SIDE
from fastmatch._internal.batches import Forward, check_module, default_forward
from fastmatch._internal.checks import check_integer
from fastmatch._internal.ranks import current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch.evaluation.between import Between, check_between, merges_between
from fastmatch.evaluation.plots import TITLES, Metric, check_metric, drawing
from fastmatch.evaluation.scores import Measure, Scores, score
from fastmatch.evaluation.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Triangle", "triangle"]

LEVELS = 100
"""Colours of a picture: steps between them would be taken for what was measured."""


@dataclass(frozen=True)
class Triangle:
    """Loss and accuracy at merges of three models.

    Example:
        >>> found = fm.triangle([model_a, model_b, model_c], test_loader, points=3)
        >>> len(found.weights)
        6

    Attributes:
        weights: of the three models, one row per merge; corners included.
        scores: loss, top-1 and top-5 accuracy at each row.
    """

    weights: tuple[tuple[float, float, float], ...]
    scores: tuple[Scores, ...]

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the corners' losses mixed by the merge's weights, at least 0; NaN if a loss is.

        A corner has no rise, so this is 0 where the corners are the worst points. :attr:`fastmatch.Curve.barrier` compares with the mean of
        its ends, as the paper does, so the two differ where ends have different losses.
        """
        if any(math.isnan(s.loss) for s in self.scores):
            return math.nan
        corner = [self.scores[self.weights.index(c)].loss for c in _CORNERS]
        rises = (
            s.loss - sum(w * v for w, v in zip(row, corner, strict=True))
            for row, s in zip(self.weights, self.scores, strict=True)
        )
        return max(0.0, *rises)

    def table(self) -> Table:
        """Return a row per merge: ``a``, ``b``, ``c`` (weights), ``loss``, ``top-1``, ``top-5``, ``metric`` if given."""
        has_metric = not all(math.isnan(s.metric) for s in self.scores)
        rows = []
        for (a, b, c), s in zip(self.weights, self.scores, strict=True):
            row = {"a": a, "b": b, "c": c, "loss": s.loss, "top-1": s.accuracy, "top-5": s.top5}
            rows.append({**row, "metric": s.metric} if has_metric else row)
        return Table(tuple(rows))

    def plot(
        self,
        path: str | Path | None = None,
        *,
        metric: Metric = "loss",
        names: Sequence[str] = ("A", "B", "C"),
        ax: Axes | None = None,
    ) -> Axes:
        """Draw the triangle as filled contours (needs matplotlib).

        Example:
            >>> found = fm.triangle([model_a, model_b, model_c], test_loader, points=3)
            >>> ax = found.plot(metric="accuracy", names=["first", "second", "third"])

        Args:
            path: a .png, .svg or .pdf file to write; an existing one is replaced.
            metric: ``"loss"``, ``"accuracy"``, ``"top5"`` or ``"metric"``.
            names: what to call the three models, at the corners.
            ax: matplotlib axes to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed (``pip install fastmatch[plot]``).
            ValueError: an unknown metric, one that was not measured, not three names, or a file of another format.
        """
        check_metric(metric)
        if len(names) != 3:
            raise ValueError(f"names: expected three, got {len(names)}")
        values = [getattr(s, metric) for s in self.scores]
        if any(map(math.isnan, values)):
            found = "was not measured" if all(map(math.isnan, values)) else "has merges where it is no number"
            raise ValueError(f"metric: {metric!r} {found} on this triangle")
        x = [b + c / 2 for _, b, c in self.weights]
        y = [c * 3**0.5 / 2 for _, _, c in self.weights]
        with drawing(path, ax, (5, 4)) as axes:
            from matplotlib.ticker import MaxNLocator

            low, high = min(values), max(values)
            room = 1e-3 * (
                (high - low) or abs(high) or 1.0
            )  # a plateau at the highest level would stay white
            filled = axes.tricontourf(
                x, y, values, levels=torch.linspace(low, high + room, LEVELS + 1, device="cpu").tolist()
            )
            axes.scatter(
                x, y, s=8, color="white", edgecolors="black", linewidths=0.4, clip_on=False, zorder=3
            )  # where merges were evaluated; those on the sides are whole
            ticks = MaxNLocator(6)  # round numbers; not those of the levels
            axes.figure.colorbar(filled, ax=axes, label=TITLES[metric].lower(), shrink=0.8, ticks=ticks)
            corners = ((0, 0, -1, "left"), (1, 0, -1, "right"), (0.5, 3**0.5 / 2, 1, "center"))
            for name, (left, up, side, align) in zip(names, corners, strict=True):
                axes.annotate(
                    name, (left, up), xytext=(0, 7 * side), textcoords="offset points", ha=align,
                    va="bottom" if side > 0 else "top", fontweight="bold", annotation_clip=False,
                )  # fmt: skip
            said = f", barrier {self.barrier:.3g}" if metric == "loss" else ""
            axes.set_title(f"{TITLES[metric]} over the triangle{said}", loc="left", fontsize="medium", pad=22)
            axes.set_aspect("equal")
            axes.set_axis_off()
        return axes


_CORNERS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def triangle(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    points: int = 5,
    *,
    between: Between | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Triangle:
    """Evaluate merges over the triangle that three models span.

    Example:
        >>> found = fm.triangle([model_a, model_b, model_c], test_loader, points=3)
        >>> rows = found.table()

    Args:
        models: three models of one architecture, aligned; evaluated as they are at the corners.
        data: a loader of (inputs, targets), read once per merge.
        points: positions on each side, corners included; at least 2. The triangle has ``points (points + 1) / 2``.
        between, loss, metric, forward, progress: see :func:`fastmatch.interpolate`; ``between`` corrects every merge that is
            not a corner.

    Returns:
        A :class:`Triangle`.

    Raises:
        TypeError: a model is not a torch module, or ``between`` is neither None, Renormalized nor callable.
        ValueError: not three models, fewer than 2 points, or data without targets.

    Cost: one read of ``data`` per merge.
    """
    ranks = current()
    with ranks.together():
        if len(models) != 3:
            raise ValueError(f"models: expected three, got {len(models)}")
        check_integer("points", points, LEAST_ON_A_SIDE)
        check_between(between)
        for k, model in enumerate(models):
            check_module(model, f"models[{k}]")
        check_same_on_ranks(ranks, "triangle", {"points": int(points), "between": between})
    points = int(points)
    n = points - 1
    rows = [((n - i - j) / n, i / n, j / n) for i in range(points) for j in range(points - i)]
    inner = [row for row in rows if row not in _CORNERS]
    merges = merges_between(models, inner, between, forward, progress)
    found = {
        row: score(model, data, loss=loss, metric=metric, forward=forward, progress=progress)
        for row, model in (*zip(_CORNERS, models, strict=True), *zip(inner, merges, strict=True))
    }
    return Triangle(tuple(rows), tuple(found[row] for row in rows))
