"""Loss and accuracy of a classifier on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    batches_of,
    check_module,
    default_forward,
    evaluating,
    split_batch,
)

__all__ = ["Scores", "evaluate", "score"]


class Scores(NamedTuple):
    """Mean loss, top-1 and top-5 accuracy of a classifier.

    Example:
        >>> scores = fm.score(model_a, test_loader)
        >>> 0 <= scores.accuracy <= scores.top5 <= 1
        True

    Attributes:
        loss: mean over samples.
        accuracy: fraction of samples whose class is the most likely one, 0 to 1.
        top5: fraction of samples whose class is among the five most likely, 0 to 1.
    """

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
    """Measure loss, top-1 and top-5 accuracy of a classifier in eval mode, in one read of ``data``.

    Example:
        >>> loss, accuracy, top5 = fm.score(model_a, test_loader)

    Args:
        model: it is not changed.
        data: a loader of (inputs, targets); targets are (batch,) class indices.
        loss: ``loss(output, targets)``, a mean over the batch.
        forward: ``forward(model, batch)`` runs the model on a batch and returns (batch, classes).
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        :class:`Scores`, means over all samples.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: no data, or data without targets.
    """
    check_module(model, "model")
    total_loss, right, among, count = 0.0, 0, 0, 0
    with evaluating(model):
        for batch in batches_of(data, "evaluation", progress=progress):
            targets = split_batch(batch)[1]
            if not isinstance(targets, torch.Tensor):
                raise ValueError("data: expected (inputs, targets) pairs to evaluate on, got only inputs")
            output = forward(model, batch)
            targets = targets.to(output.device)
            total_loss += float(loss(output, targets)) * len(targets)
            right += int((output.argmax(dim=1) == targets).sum())
            best = output.topk(min(5, output.shape[1]), dim=1).indices
            among += int((best == targets[:, None]).sum())
            count += len(targets)
    if count == 0:
        raise ValueError("data: yielded no samples")
    return Scores(total_loss / count, right / count, among / count)


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> tuple[float, float]:
    """Return (mean loss, accuracy) of a classifier: the first two of :func:`score`, with the same arguments.

    Example:
        >>> loss, accuracy = fm.evaluate(model_a, test_loader)

    Raises:
        TypeError, ValueError: see :func:`score`.
    """
    found = score(model, data, loss=loss, forward=forward, progress=progress)
    return found.loss, found.accuracy
