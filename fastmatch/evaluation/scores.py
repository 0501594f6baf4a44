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
