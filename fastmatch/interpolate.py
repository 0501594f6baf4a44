"""Loss and accuracy along the straight line between two models, and the barrier on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch.batches import Forward, batches_of, check_module, default_forward, evaluating, split_batch
from fastmatch.merge import merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "evaluate", "interpolate"]


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at positions lambda of ``(1 - lambda) a + lambda b``.

    Attributes:
        positions: lambda, from 0 (model A) to 1 (model B).
        loss: mean loss at each.
        accuracy: share of samples classified right at each, 0 to 1.
    """

    positions: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

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
    check_module(model, "model")
    total_loss, right, count = 0.0, 0, 0
    with evaluating(model):
        for batch in batches_of(data, "evaluation", progress=progress):
            targets = split_batch(batch)[1]
            if not isinstance(targets, torch.Tensor):
                raise ValueError("data: expected (inputs, targets) pairs to evaluate on, got inputs alone")
            output = forward(model, batch)
            targets = targets.to(output.device)
            total_loss += float(loss(output, targets)) * len(targets)
            right += int((output.argmax(dim=1) == targets).sum())
            count += len(targets)
    if count == 0:
        raise ValueError("data: yielded no sample")
    return total_loss / count, right / count


def interpolate(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Any],
    *,
    points: int = 11,
    transform: Callable[[nn.Module, tuple[float, float]], nn.Module] | None = None,
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
        loss: ``loss(output, targets)``, a mean over the batch.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    if points < 3:
        raise ValueError(f"points: expected at least 3, got {points}")
    check_module(model_a, "model_a")
    check_module(model_b, "model_b")
    positions, losses, accuracies = [], [], []
    for k in range(points):
        position = k / (points - 1)
        weights = (1 - position, position)
        if position == 0.0:
            model = model_a
        elif position == 1.0:
            model = model_b
        else:
            model = merge([model_a, model_b], weights)
            if transform is not None:
                model = transform(model, weights)
        value, share = evaluate(model, data, loss=loss, forward=forward, progress=progress)
        positions.append(position)
        losses.append(value)
        accuracies.append(share)
    return Curve(tuple(positions), tuple(losses), tuple(accuracies))
