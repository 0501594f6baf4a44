"""The diagonal of the Fisher information: how much each parameter matters to a network's output."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fastmatch._internal.batches import (
    arguments_for,
    batches_of,
    device_of,
    evaluating,
    prediction_of,
    split_batch,
)
from fastmatch._internal.checks import check_choice, check_integer
from fastmatch._internal.class_targets import check_class_outputs, check_class_targets
from fastmatch._internal.shared_data import read_in_step
from fastmatch._internal.states import working_dtype
from fastmatch._internal.wrapped_buffers import buffers_sent_once

__all__ = ["Labels", "diagonal_fisher", "gradients_by_sample"]


EXPECTED = "data: expected classes of a classifier, because Fisher information is that of the cross entropy"

Labels: TypeAlias = Literal["data", "sampled"]
"""Whose labels the likelihood is of: the data's (the empirical Fisher information), or drawn from the model's own
prediction (the Fisher information itself, in expectation)."""


def diagonal_fisher(
    model: nn.Module,
    data: Iterable[Any],
    *,
    labels: Labels = "data",
    samples: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Return the diagonal of the Fisher information: parameter name -> a tensor of its shape.

    Each entry is the mean over samples of the squared gradient of the sample's log-likelihood (cross entropy).
    ``weight ** 2 * fisher`` is the score of diagonal-Fisher (optimal brain damage) pruning.

    Args:
        model: a classifier; it is run in eval mode and not changed.
        data: batches of (inputs, targets) or of mappings with ``"labels"``, read once. For ``labels="sampled"`` inputs are
            enough.
        labels: ``"data"`` takes the targets: the empirical Fisher information. ``"sampled"`` draws one label per sample
            from the model's own prediction: its expectation is the Fisher information itself.
        samples: stop after this many samples; None reads all of them.
        seed: of the drawn labels.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: ``data`` does not yield pairs of tensors, an option is out of range, the model has one output or the targets are no
            classes, or a gradient is not finite.

    Cost: a per-sample gradient (``torch.func``), so the memory of one model per sample of a batch. A model that branches on values,
    such as one with experts, is run sample by sample. Squares and sums
    are in float32 or wider; gradients that underflow in a half-precision backward pass are lost. ``torch.autocast`` is off
    inside: torch has no per-sample gradients under it.
    """
    totals: dict[str, torch.Tensor] = {}
    count = 0
    found = gradients_by_sample(
        model, data, labels=labels, samples=samples, seed=seed, title="diagonal Fisher", progress=progress
    )
    for number, gradients in enumerate(found):
        count += len(next(iter(gradients.values())))
        for name in list(gradients):
            g = gradients.pop(name)  # not kept while the next ones are computed
            square = g.to(working_dtype(g.dtype)).square().sum(0)
            if not bool(torch.isfinite(square).all()):
                raise ValueError(
                    f"data: the gradient of {name!r} on batch {number} (counted from 0) holds NaN or infinity"
                )
            totals[name] = totals[name] + square if name in totals else square
            del g
    return {name: total / count for name, total in totals.items()}


# parameters: those of diagonal_fisher, and a title
def gradients_by_sample(
    model: nn.Module,
    data: Iterable[Any],
    *,
    labels: Labels = "data",
    samples: int | None = None,
    seed: int = 0,
    title: str = "gradients",
    progress: bool | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the gradients of each sample's log-likelihood, batch by batch: parameter name -> (samples, *shape).

    Args:
        model, data, labels, samples, seed, progress: see :func:`diagonal_fisher`.
        title: of the progress bar.

    Raises:
        ValueError: see :func:`diagonal_fisher`.
    """
    check_choice("labels", labels, Labels)
    check_integer("seed", seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}

    def loss(values: dict[str, torch.Tensor], inputs: Any, y: torch.Tensor) -> torch.Tensor:
        args, kwargs = tree_map(lambda x: x[None], inputs)
        output = prediction_of(torch.func.functional_call(model, (values, buffers), args, kwargs))
        check_class_outputs(output, EXPECTED)
        return F.cross_entropy(output, y[None])

    gradient = torch.func.grad(loss)
    together = torch.func.vmap(gradient, in_dims=(None, 0, 0), randomness="different")
    is_batched = True
    with evaluating(model), buffers_sent_once(model), torch.autocast(device_of(model).type, enabled=False):
        batches = batches_of(data, title, samples=samples, progress=progress)
        for number, batch in enumerate(read_in_step(batches, model)):
            inputs, y = split_batch(batch)
            inputs = arguments_for(model, inputs)
            if not all(isinstance(x, torch.Tensor) for x in tree_leaves(inputs)):
                raise ValueError("data: expected inputs that are tensors")
            if labels == "sampled":
                logits = prediction_of(model(*inputs[0], **inputs[1])).float()
                if not bool(torch.isfinite(logits).all()):
                    raise ValueError(
                        f"data: the model's outputs on batch {number} (counted from 0) hold NaN or infinity"
                    )
                y = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)[:, 0]
            if not isinstance(y, torch.Tensor):
                raise ValueError(
                    'data: expected (inputs, targets) pairs of tensors, or mappings with labels; labels="sampled" needs none'
                )
            check_class_targets(y, EXPECTED)
            y, found = y.to(device_of(model)), None
            if is_batched:
                try:
                    with _loops_untold():
                        found = together(parameters, inputs, y)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    # torch cannot run many samples at once through experts or exits, which branch on values.
                    is_batched = False
            if found is None:
                found = {name: p.new_empty(len(y), *p.shape) for name, p in parameters.items()}
                for k in range(len(y)):
                    for name, g in gradient(parameters, _sample(inputs, k), y[k]).items():
                        found[name][k] = g
            yield found


def _sample(inputs: Any, k: int) -> Any:
    """Return one sample of nested inputs."""
    return tree_map(lambda x: x[k], inputs)


@contextmanager
def _loops_untold() -> Iterator[None]:
    """Inside, torch does not tell which operations ``vmap`` runs sample by sample: a user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop because we have not yet implemented the batching rule"
        )
        yield
