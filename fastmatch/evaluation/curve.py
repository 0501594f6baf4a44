"""Loss and scores along the straight line between two models, and the barrier on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastmatch._internal.allowed import LEAST_ON_A_LINE
from fastmatch._internal.batches import Forward, check_module, default_forward
from fastmatch._internal.checks import check_integer
from fastmatch._internal.ranks import current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch.evaluation.between import Between, check_between, merges_between
from fastmatch.evaluation.plots import TITLES, Metric, check_metric, drawing, framed, legend_beside
from fastmatch.evaluation.scores import Measure, score
from fastmatch.evaluation.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "interpolate"]


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at positions lambda of ``(1 - lambda) a + lambda b``.

    Example:
        >>> curve = fm.Curve((0.0, 0.5, 1.0), (1.0, 4.0, 2.0), (0.9, 0.2, 0.7))
        >>> curve.barrier
        2.5

    Attributes:
        positions: lambda, from 0 (model A) to 1 (model B).
        loss: mean loss at each position.
        accuracy: fraction of samples classified correctly at each position, 0 to 1.
        top5: fraction of samples whose class is among the five most likely.
        metric: the given metric at each position.

    Accuracy and top5 are empty where targets are not classes, and metric is empty if none was given.
    """

    positions: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] = ()
    top5: tuple[float, ...] = ()
    metric: tuple[float, ...] = ()

    @property
    def barrier(self) -> float:
        """Largest rise of the loss above the mean of the ends (the paper's loss barrier); NaN if a loss is.

        An end is a point of the line, so it is at least half the difference of the ends' losses, and equal to that where no point between is worse
        than both ends (:attr:`has_no_rise`).
        """
        if any(map(math.isnan, self.loss)):
            return math.nan
        return max(0.0, max(self.loss) - (self.loss[0] + self.loss[-1]) / 2)

    @property
    def has_no_rise(self) -> bool:
        """Whether no point between the ends has a loss above that of both: the barrier is half the difference of the ends then."""
        return not math.isnan(self.barrier) and max(self.loss) == max(self.loss[0], self.loss[-1])

    @property
    def accuracy_barrier(self) -> float:
        """Largest drop of the accuracy below the mean of the ends, 0 to 1; NaN without accuracy."""
        if not self.accuracy:
            return math.nan
        return max(0.0, (self.accuracy[0] + self.accuracy[-1]) / 2 - min(self.accuracy))

    @property
    def midpoint(self) -> tuple[float, float]:
        """(loss, accuracy) at the position nearest to one half; the accuracy is NaN if it was not measured."""
        k = min(range(len(self.positions)), key=lambda i: abs(self.positions[i] - 0.5))
        return self.loss[k], self.accuracy[k] if self.accuracy else math.nan

    def table(self) -> Table:
        """Return a row per position: ``position``, ``loss``, ``top-1``, ``top-5``, and ``metric`` if one was given."""
        unknown = (math.nan,) * len(self.positions)
        columns = {"position": self.positions, "loss": self.loss}
        columns |= {"top-1": self.accuracy or unknown, "top-5": self.top5 or unknown}
        columns |= {"metric": self.metric} if self.metric else {}
        rows = zip(*columns.values(), strict=True)
        return Table(tuple(dict(zip(columns, row, strict=True)) for row in rows))

    def plot(
        self,
        path: str | Path | None = None,
        *,
        metric: Metric = "loss",
        label: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw the curve and its barrier: the distance of the worst point from the mean of the ends (needs matplotlib).

        Example:
            >>> curve = fm.interpolate(model_a, model_b, test_loader, points=3)
            >>> ax = curve.plot(label="naive")

        Args:
            path: a .png, .svg or .pdf file to write; an existing one is replaced.
            metric: ``"loss"``, ``"accuracy"``, ``"top5"`` or ``"metric"``.
            label: the line's name in the legend, which stands beside the axes with the barriers of all lines.
            ax: matplotlib axes to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed (``pip install fastmatch[plot]``).
            ValueError: an unknown metric, one that was not measured, or a file of another format.
        """
        check_metric(metric)
        values = getattr(self, metric)
        if not values:
            raise ValueError(f"metric: {metric!r} was not measured on this curve")
        with drawing(path, ax) as axes:
            worst = max if metric == "loss" else min
            k = values.index(worst(values))
            ends = (values[0] + values[-1]) / 2
            barrier = abs(values[k] - ends) if worst(values[k], ends) == values[k] else 0.0
            said = f": barrier {barrier:.3g}" if metric == "loss" else f": drop {100 * barrier:.1f} points"
            said = "" if metric == "metric" else said  # which of its values are bad is not known
            (line,) = axes.plot(
                self.positions, values, marker=".", label=None if label is None else label + said
            )
            if said:
                axes.vlines(
                    self.positions[k], *sorted((ends, values[k])), color=line.get_color(), linestyle=":", lw=1
                )
            axes.set_xlabel("λ  (0 = A, 1 = B)")
            axes.set_ylabel(TITLES[metric].lower())
            title = TITLES[metric] + " on the line from A to B"
            framed(axes, title + said.replace(":", ",") if label is None else title)
            legend_beside(axes)
        return axes


# parameters: two models, what is measured on what, and progress
def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Any],
    points: int = 11,
    *,
    between: Between | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Curve:
    """Evaluate ``points`` equally spaced models on the line from A to B.

    Example:
        >>> curve = fm.interpolate(model_a, model_b, test_loader, points=5)
        >>> repaired = fm.interpolate(model_a, model_b, test_loader, 5, between=fm.Renormalized(loader, "repair"))
        >>> barriers = curve.barrier, repaired.barrier

    Args:
        model_a, model_b: models of one architecture, aligned; evaluated as they are at the ends.
        data: a loader of (inputs, targets) or of mappings with ``"labels"``, read once per point.
        points: number of positions, both ends included; at least 3.
        between: how the merges between the ends are corrected. None leaves them as they are; a
            :class:`fastmatch.Renormalized` renormalizes them; a callable ``between(merged, weights)`` returns the model
            to evaluate.
        loss, metric, forward: see :func:`fastmatch.score`.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        A :class:`Curve`.

    Raises:
        TypeError: a model is not a torch module, or ``between`` is none of the above.
        ValueError: fewer than 3 points, or data without targets.

    Cost: ``points`` reads of ``data``.
    """
    ranks = current()
    with ranks.together():
        check_integer("points", points, LEAST_ON_A_LINE)
        check_between(between)
        check_module(model_a, "model_a")
        check_module(model_b, "model_b")
        check_same_on_ranks(ranks, "interpolate", {"points": int(points), "between": between})
    points = int(points)
    positions = tuple(k / (points - 1) for k in range(points))
    pairs = [(1 - t, t) for t in positions[1:-1]]
    inner = merges_between([model_a, model_b], pairs, between, forward, progress)
    measured = partial(score, data=data, loss=loss, metric=metric, forward=forward, progress=progress)
    scores = [measured(model) for model in chain([model_a], inner, [model_b])]

    def column(name: str) -> tuple[float, ...]:
        values = tuple(getattr(s, name) for s in scores)
        return () if all(map(math.isnan, values)) else values

    return Curve(
        positions,
        tuple(s.loss for s in scores),
        column("accuracy"),
        column("top5"),
        tuple(s.metric for s in scores) if metric is not None else (),
    )
