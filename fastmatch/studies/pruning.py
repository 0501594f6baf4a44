"""Masks that show the renormalization of pruned networks: magnitude, N:M, Wanda, diagonal-Fisher and reconstruction scores.

:func:`fastmatch.renormalize` works on the output of any pruning library. The functions here only score weights
and set them to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, default_forward, evaluating
from fastmatch._internal.layer_calls import on_call, on_input
from fastmatch._internal.modules import copy_module
from fastmatch._internal.progress import progress_bar
from fastmatch.evaluation.scores import evaluate
from fastmatch.evaluation.table import Table
from fastmatch.renorm import Renormalization, applied_plan, endpoint_statistics, renormalize
from fastmatch.renorm.layers import by_outputs, channel_dim, raw_weight, survey
from fastmatch.renorm.least_squares import LayerFit
from fastmatch.renorm.options import RIDGE, Method
from fastmatch.statistics.fisher import diagonal_fisher

__all__ = [
    "Pruner",
    "Reconstruction",
    "accuracy_by_sparsity",
    "diagonal_fisher",
    "global_magnitude",
    "input_norms",
    "layer_magnitude",
    "mask_of",
    "n_of_m",
    "pruned_copy",
    "sparsity",
]

Pruner: TypeAlias = Callable[[nn.Module, float], nn.Module]
"""``pruner(dense, amount)`` returns a pruned copy, in which about this fraction of the weights is zero."""


def mask_of(scores: torch.Tensor, amount: float, *, by_row: bool = False) -> torch.Tensor:
    """Return True for the weights to keep: all but the fraction ``amount`` with the lowest scores.

    Example:
        >>> from fastmatch.studies.pruning import mask_of
        >>> mask_of(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5).tolist()
        [[True, False, True, False]]

    Args:
        scores: one per weight; ``weight.abs()`` for magnitude pruning.
        amount: fraction to prune, 0 to 1, of the tensor or of each row.
        by_row: compare within rows, as Wanda does. Rows are output channels, except in GPT-2's Conv1D, whose weight is
            (inputs, outputs): give ``scores.T`` and transpose the mask.

    Raises:
        ValueError: ``amount`` is out of range.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount: expected 0 to 1; got {amount}")
    rows = scores.detach().reshape(len(scores) if by_row else 1, -1)
    count = round(amount * rows.shape[1])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.topk(count, dim=1, largest=False).indices, False)
    return mask.view(scores.shape)


def n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return an N:M mask: True for the ``n`` largest of every ``m`` neighbours along a row, by absolute value.

    Example:
        >>> from fastmatch.studies.pruning import n_of_m
        >>> n_of_m(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 1, 2).tolist()
        [[True, False, True, False]]

    Raises:
        ValueError: ``n`` is not from 1 to ``m``, or ``m`` does not divide the rows.
    """
    if not 0 < n <= m:
        raise ValueError(f"n: expected 1 to m = {m}; got {n}")
    width = scores[0].numel()
    if width % m:
        raise ValueError(f"scores: expected rows of a multiple of {m}; got {width}")
    blocks = scores.detach().abs().reshape(-1, m)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    mask.scatter_(1, blocks.topk(n, dim=1).indices, True)
    return mask.view(scores.shape)


def pruned_copy(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of ``model`` in which the named layers' weights are zero where the mask is False.

    Of a layer that is pruned already (torch.nn.utils.prune) ``weight_orig`` becomes zero there, and its own mask stays.

    Raises:
        ValueError: a mask names a layer without a weight, or one that computes its weight otherwise, such as weight_norm.
    """
    new = copy_module(model)
    modules = dict(new.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            weight = getattr(modules.get(name), "weight", None)
            if not isinstance(weight, torch.Tensor):
                raise ValueError(f"masks: model has no tensor '{name}.weight'")
            raw = raw_weight(modules[name])
            if raw is not None and raw.shape != weight.shape:
                raw = None  # weight norm scales with its rows, but has no entry for each weight
            if raw is not None:
                raw.mul_(mask.to(raw))
                if isinstance(getattr(modules[name], "weight_mask", None), torch.Tensor):
                    weight.mul_(mask.to(weight))  # what the layer holds until its next call
            if raw is None or bool(modules[name].weight[~mask.bool()].any()):  # pyright: ignore
                raise ValueError(
                    f"masks: expected layers that hold their weight; {name!r} computes it from other tensors (as weight_norm does); "
                    "call torch.nn.utils.parametrize.remove_parametrizations first"
                )
    return new


def layer_magnitude(dense: nn.Module, amount: float) -> nn.Module:
    """Return a copy in which the smallest weights of every layer are zero, the same fraction in each.

    Example:
        >>> from fastmatch.studies.pruning import layer_magnitude
        >>> pruned = layer_magnitude(model_a, 0.5)
    """
    layers = survey(dense)[0]
    return pruned_copy(dense, {name: mask_of(layer.weight.abs(), amount) for name, layer in layers.items()})


def global_magnitude(dense: nn.Module, amount: float) -> nn.Module:
    """Return a copy in which the smallest weights of all layers together are zero; whole channels may be.

    Example:
        >>> from fastmatch.studies.pruning import global_magnitude
        >>> pruned = global_magnitude(model_a, 0.5)
    """
    layers = survey(dense)[0]
    scores = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
    parts = mask_of(scores, amount).split([layer.weight.numel() for layer in layers.values()])
    masks = {name: m.view_as(layer.weight) for (name, layer), m in zip(layers.items(), parts, strict=True)}
    return pruned_copy(dense, masks)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A pruner by reconstruction: the weights that remain make up for those that go (as in SparseGPT).

    The weights with the least :meth:`saliency <fastmatch.renorm.least_squares.LayerFit.saliency>` become zero, the same
    fraction in each layer. The others are then fitted to the dense network's outputs, layer after layer
    (``fm.renormalize(pruned, [dense], data, "least-squares")``).

    Example:
        >>> from fastmatch.studies.pruning import Reconstruction, sparsity
        >>> pruned = Reconstruction(loader)(model_a, 0.5)
        >>> round(sparsity(pruned), 2)
        0.5

    Args:
        data: calibration data, read twice for each network.
        samples: use this many from the front of the data; None takes all.
        ridge: see :class:`fastmatch.Renormalization`.
    """

    data: Iterable[Any] = field(repr=False)
    samples: int | None = None
    ridge: float = RIDGE

    def __call__(self, dense: nn.Module, amount: float) -> nn.Module:
        """Return a pruned copy of ``dense`` in which about the fraction ``amount`` of the weights is zero."""
        options = Renormalization(
            "least-squares", "sequential", self.samples, ridge=self.ridge, restore_variance=False
        )
        fits = [LayerFit(name, layer) for name, layer in survey(dense)[0].items()]
        with evaluating(dense), ExitStack() as hooks:
            for fit in fits:
                hooks.callback(on_call(fit.layer, fit.add).remove)
            for batch in batches_of(self.data, "reconstruction", samples=self.samples, progress=False):
                default_forward(dense, batch)
        masks = {fit.name: mask_of(fit.saliency(self.ridge), amount) for fit in fits}
        return renormalize(
            pruned_copy(dense, masks), [dense], self.data, options, weights=[1.0], progress=False
        )


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in the weights of linear and convolution layers."""
    layers = survey(model)[0].values()
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return zeros / sum(layer.weight.numel() for layer in layers)


def input_norms(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Return the norms of every layer's inputs, shaped to multiply its weight.

    ``weight.abs() * norm`` is Wanda's score. Only linear layers and convolutions without groups are measured, with
    one norm per input channel.

    Args:
        model: left as it is.
        data: calibration data.
        forward: runs the model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    sums: dict[str, torch.Tensor] = {}

    def measure(name: str, layer: nn.Module):
        def see(inputs: torch.Tensor) -> None:
            x = inputs.double()
            x = x.movedim(channel_dim(layer, x), -1)
            square = x.flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

        return see

    layers = {n: m for n, m in survey(model)[0].items() if getattr(m, "groups", 1) == 1}
    handles = [on_input(layer, measure(name, layer)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches_of(data, "input norms", progress=progress):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: by_outputs(
            layers[name],
            total.sqrt().to(layers[name].weight.dtype).view(1, -1, *[1] * (layers[name].weight.ndim - 2)),
        )
        for name, total in sums.items()
    }


def accuracy_by_sparsity(
    dense: nn.Module,
    data: Iterable[Any],
    test: Iterable[Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    pruner: Pruner = layer_magnitude,
    method: Method = "auto",
    samples: int | None = None,
    progress: bool | None = None,
) -> Table:
    """Measure a pruned network with and without renormalization, one row per sparsity.

    The statistics of the dense model are measured once for all rows.

    Args:
        dense: a classifier; left as it is.
        data: calibration data.
        test: (inputs, targets) to evaluate on.
        sparsities: fractions of the weights to prune.
        pruner: ``pruner(dense, amount)`` returns the pruned copy: :func:`layer_magnitude`, :func:`global_magnitude`,
            :class:`Reconstruction` of some data, or a function that calls any pruning library or applies given masks.
        method, samples: see :func:`fastmatch.renormalize`.
        progress: show a bar; None shows it on a terminal.
    """
    options = Renormalization(method, samples=samples)
    # Least squares compares outputs sample by sample.
    known = (
        [dense]
        if method == "least-squares"
        else endpoint_statistics([dense], data, samples=samples, progress=False)
    )
    rows = []
    for amount in progress_bar(sparsities, "pruning", show=progress):
        pruned = pruner(dense, amount)
        new = renormalize(pruned, known, data, options, weights=[1.0], progress=False)
        (loss, accuracy), (new_loss, new_accuracy) = (
            evaluate(model, test, progress=False) for model in (pruned, new)
        )
        plan = applied_plan(new)
        rows.append(
            {
                "sparsity": amount, "loss": loss, "accuracy": accuracy,
                "method": plan and plan.method, "renormalized loss": new_loss, "renormalized accuracy": new_accuracy,
            }
        )  # fmt: skip
    return Table(tuple(rows))
