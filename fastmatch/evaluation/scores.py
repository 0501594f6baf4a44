"""Loss, accuracy and other scores of a model on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    arguments_for,
    batches_of,
    check_data,
    check_forward,
    check_module,
    default_forward,
    described,
    evaluating,
    prediction_of,
    samples_in,
    split_batch,
)
from fastmatch._internal.class_targets import check_class_outputs, check_class_targets
from fastmatch._internal.padding import is_rows, padded, takes
from fastmatch._internal.ranks import current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.shared_data import Share, read_alike, share_of_rank

__all__ = ["Measure", "Scores", "evaluate", "score"]

Measure: TypeAlias = Callable[[Any, Any], Any]
"""``measure(output, targets)`` of a batch: a number or a tensor of one."""

IGNORED = -100
"""The target that torch's and transformers' losses leave out."""


class Scores(NamedTuple):
    """Mean loss of a model, and what else was measured; NaN is what was not.

    Example:
        >>> scores = fm.score(model_a, test_loader)
        >>> 0 <= scores.accuracy <= scores.top5 <= 1
        True

    Attributes:
        loss: mean over samples, without those whose class is -100.
        accuracy: fraction of samples whose class is the most likely one, 0 to 1; NaN if targets are not classes.
        top5: fraction of samples whose class is among the five most likely, 0 to 1; NaN if targets are not classes.
        metric: mean of the given metric; NaN if none was given.
    """

    loss: float
    accuracy: float
    top5: float
    metric: float = math.nan


def score(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Measure | None = None,
    metric: Measure | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Scores:
    """Measure the loss of a model in eval mode, its accuracy if it classifies, and a metric, in one read of ``data``.

    Example:
        >>> scores = fm.score(model_a, test_loader)
        >>> errors = fm.score(model_a, test_loader, metric=lambda out, y: (out.argmax(1) != y).float().mean())
        >>> abs(scores.accuracy + errors.metric - 1) < 1e-6
        True

    Args:
        model: it is not changed.
        data: a loader of (inputs, targets), or of mappings with ``"labels"``.
        loss: ``loss(output, targets)``, a mean over the batch. None takes the loss that the model returns if its
            forward pass takes ``labels``, as in transformers, else the cross entropy.
        metric: ``metric(output, targets)``, a mean over the batch.
        forward: ``forward(model, batch)`` runs the model on a batch. Of an output object or a mapping, loss and metric
            are given the ``logits``.
        progress: show a progress bar; None shows it on a terminal.

    In a torch.distributed process group all ranks make the call. They share the batches of a list, or of a DataLoader whose
    length is known, and get the same scores on any number of ranks. A model whose ranks have to run together (FSDP, tensor
    parallelism, ZeRO-3, DistributedDataParallel) runs on all batches on every rank.

    Returns:
        :class:`Scores`, means over all samples; over all targets that are not -100 where these are classes. Accuracy
        is measured where the targets are (batch,) integers and the outputs (batch, classes).

    Raises:
        TypeError: ``model`` is not a torch module, or ``loss`` or ``metric`` is not callable.
        ValueError: no data, data without targets, inputs that are not finite, classes that the model does not have, cross
            entropy of other targets than classes, or ranks that were given different models or options.
    """

    def add(totals: _Totals, batch: Any, number: int | None = None) -> None:
        inputs, targets = split_batch(batch)
        if is_rows(targets) and not isinstance(targets, torch.Tensor):
            targets = padded({"labels": targets}, model)["labels"]
        if not isinstance(targets, torch.Tensor):
            raise ValueError("data: expected (inputs, targets) pairs to evaluate on, got only inputs")
        if loss is None and forward is default_forward and takes(model, "labels"):
            args, kwargs = arguments_for(model, inputs)
            returned = model(*args, **kwargs, labels=_moved_to_model(model, targets))
        else:
            returned = forward(model, batch)
        output = prediction_of(returned)
        if isinstance(output, torch.Tensor):
            targets = targets.to(output.device)
        value = _loss_of(returned, output, targets) if loss is None else loss(output, targets)
        _check_number("loss", value)
        if not math.isfinite(float(value)):
            _check_inputs(inputs, number)
        measured = None if metric is None else metric(output, targets)
        if metric is not None:
            _check_number("metric", measured)
        totals.add(value, measured, output, targets, samples_in(batch))

    totals = _Totals()
    ranks = current()
    with ranks.together():
        _check(model, data, loss, metric, forward)
        options = {"loss": loss, "metric": metric, "forward": forward}
        check_same_on_ranks(ranks, "score", options, {"model": model})
        with evaluating(model, compiled=True):
            share = share_of_rank(data, model)
            if share is not None:
                for part in _shared(share, add, progress):
                    totals.take(part)
            else:
                every = read_alike(batches_of(data, "evaluation", progress=progress), ranks, model)
                for number, batch in enumerate(every):
                    add(totals, batch, number)
    return totals.scores()


def _check(
    model: nn.Module, data: Iterable[Any], loss: Measure | None, metric: Measure | None, forward: Forward
) -> None:
    check_module(model, "model")
    check_forward(forward)
    for name, measure in (("loss", loss), ("metric", metric)):
        if measure is not None and not callable(measure):
            raise TypeError(
                f"{name}: expected a function of outputs and targets, got {type(measure).__name__}"
            )
    check_data(data)


def _shared(share: Share, add: Callable[[_Totals, Any], None], progress: bool | None) -> list[_Totals]:
    """Return the sums of all blocks of batches, in their order, of which each rank computes some."""
    mine: dict[int, _Totals] = {}
    for block, batches in share.by_block("evaluation", progress):
        mine[block] = _Totals()
        for batch in batches:
            add(mine[block], batch)
    tables = share.ranks.exchange(mine, "the end of the evaluation")
    found = {block: totals for table in tables for block, totals in table.items()}
    return [found[block] for block in sorted(found)]


def _check_number(argument: str, value: Any) -> None:
    """Raise TypeError unless a measure of a batch is one number."""
    if not hasattr(value, "__float__") or (isinstance(value, torch.Tensor) and value.numel() != 1):
        raise TypeError(
            f"{argument}: expected one number for a batch, its mean; the function returned {described(value)}"
        )


def _check_inputs(inputs: Any, number: int | None) -> None:
    """Raise ValueError if inputs are not finite. A loss that is not finite on finite inputs is the model's."""
    if isinstance(inputs, torch.Tensor):
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            which = "a batch" if number is None else f"batch {number} (counted from 0)"
            raise ValueError(f"data: {which} has inputs that are NaN or infinite")
    elif isinstance(inputs, (Mapping, tuple, list)):
        for part in inputs.values() if isinstance(inputs, Mapping) else inputs:
            _check_inputs(part, number)


def _moved_to_model(model: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    (moved,), _ = arguments_for(model, targets)
    return moved


def _loss_of(returned: Any, output: Any, targets: torch.Tensor) -> Any:
    """Return the loss in an output object, or the cross entropy of the output."""
    own = getattr(returned, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"loss: needed, because the model returned {type(output).__name__}; give loss=")
    if _is_classes(output, targets):
        known = targets[targets != IGNORED]
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < output.shape[1]:
            raise ValueError(
                f"data: targets are classes from {int(known.min())} to {int(known.max())}, and the model has {output.shape[1]} "
                "outputs"
            )
    elif targets.ndim == 1 and output.ndim == 2 and len(output) != len(targets):
        raise ValueError(f"data: a batch has {len(output)} samples and {len(targets)} targets")
    try:
        found = F.cross_entropy(output, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"loss: needed, because cross entropy does not fit outputs {tuple(output.shape)} and targets "
            f"{tuple(targets.shape)} of {targets.dtype} ({error})"
        ) from error
    needed = "loss: needed, because cross entropy is for classes; give loss="
    check_class_outputs(output, needed)
    check_class_targets(targets, needed)
    return found


def _is_classes(output: Any, targets: torch.Tensor) -> bool:
    """Whether the targets are one class per sample and the outputs one score per class."""
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and whole
        and targets.ndim == 1
        and output.ndim == 2
        and output.shape[1] > 1
        and len(output) == len(targets)
    )


class _Totals:
    """Sums over batches."""

    def __init__(self) -> None:
        self.loss = self.metric = self.weight = 0.0
        self.right = self.among = self.count = 0
        self.has_classes, self.has_metric = True, False

    def add(self, loss: Any, metric: Any, output: Any, targets: torch.Tensor, size: int) -> None:
        """Add one batch. A batch counts by its targets that are not left out, or by its samples if it has no whole targets."""
        several = targets.ndim > 1 and not (targets.is_floating_point() or targets.is_complex())
        counted = several or _is_classes(output, targets)
        weight = int((targets != IGNORED).sum()) if counted else size
        if weight:
            self.loss += float(loss) * weight
            self.metric += 0.0 if metric is None else float(metric) * weight
        self.weight, self.has_metric = self.weight + weight, metric is not None
        self.has_classes &= _is_classes(output, targets)
        if self.has_classes:
            valid = targets != IGNORED
            self.right += int((output.argmax(dim=1) == targets).sum())
            best = output.topk(min(5, output.shape[1]), dim=1).indices
            self.among += int((best == targets[:, None]).sum())
            self.count += int(valid.sum())

    def take(self, other: _Totals) -> None:
        """Add the sums of other batches."""
        for name in ("loss", "metric", "weight", "right", "among", "count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.has_classes &= other.has_classes
        self.has_metric |= other.has_metric

    def scores(self) -> Scores:
        """Return the means."""
        if self.weight == 0:
            raise ValueError("data: yielded no samples, or none with a target that is not -100")
        is_class = self.has_classes and self.count > 0
        return Scores(
            self.loss / self.weight,
            self.right / self.count if is_class else math.nan,
            self.among / self.count if is_class else math.nan,
            self.metric / self.weight if self.has_metric else math.nan,
        )


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Measure | None = None,
    metric: Measure | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> tuple[float, float]:
    """Return (mean loss, accuracy) of a model, or (mean loss, metric) if one is given; arguments as for :func:`score`.

    The accuracy is NaN if the targets are not classes.

    Example:
        >>> loss, accuracy = fm.evaluate(model_a, test_loader)

    Raises:
        TypeError, ValueError: see :func:`score`.
    """
    found = score(model, data, loss=loss, metric=metric, forward=forward, progress=progress)
    return found.loss, found.accuracy if metric is None else found.metric
