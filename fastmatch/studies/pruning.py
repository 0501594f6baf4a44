"""Masks to show renormalization on: magnitude, N:M, Wanda-style and diagonal-Fisher scores.

Pruning itself is other libraries' work: :func:`fastmatch.renormalize` takes what any of them puts out. What is
here scores weights and zeroes them, no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, default_forward, evaluating
from fastmatch._internal.modules import copy_module
from fastmatch._internal.progress import progress_bar
from fastmatch.evaluation.scores import evaluate
from fastmatch.evaluation.table import Table
from fastmatch.renorm import Renormalization, endpoint_statistics, renormalize
from fastmatch.renorm.layers import survey
from fastmatch.statistics.fisher import diagonal_fisher

__all__ = [
    "accuracy_by_sparsity",
    "diagonal_fisher",
    "input_norms",
    "mask_of",
    "n_of_m",
    "pruned_copy",
    "sparsity",
]


def mask_of(scores: torch.Tensor, amount: float, *, by_row: bool = False) -> torch.Tensor:
    """True for the weights to keep: all but the share ``amount`` of lowest score.

    Args:
        scores: one a weight; ``weight.abs()`` for magnitude pruning.
        amount: share to prune, 0 to 1, of the tensor or of each row.
        by_row: compare within rows (output channels), as Wanda does.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount: expected 0 to 1, got {amount}")
    rows = scores.detach().reshape(len(scores) if by_row else 1, -1)
    count = round(amount * rows.shape[1])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.topk(count, dim=1, largest=False).indices, False)
    return mask.view(scores.shape)


def n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """N:M sparsity: True for the ``n`` highest of every ``m`` neighbours along a row."""
    if not 0 < n <= m:
        raise ValueError(f"n: expected 1 to m = {m}, got {n}")
    width = scores[0].numel()
    if width % m:
        raise ValueError(f"scores: expected rows of a multiple of {m}, got {width}")
    blocks = scores.detach().abs().reshape(-1, m)
    mask = torch.zeros_like(blocks, dtype=torch.bool)
    mask.scatter_(1, blocks.topk(n, dim=1).indices, True)
    return mask.view(scores.shape)


def pruned_copy(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of ``model`` whose named layers' weights are zero where the mask is False."""
    new = copy_module(model)
    modules = dict(new.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            weight = getattr(modules.get(name), "weight", None)
            if not isinstance(weight, torch.Tensor):
                raise ValueError(f"masks: model has no tensor '{name}.weight'")
            weight.mul_(mask.to(weight))
    return new


def sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of linear and convolution layers."""
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
    """Per layer the norms of its inputs, shaped to multiply its weight: ``weight.abs() * norm`` is Wanda's score.

    Linear layers and convolutions without groups (a norm an input channel); others are left out.
    """
    sums: dict[str, torch.Tensor] = {}

    def measure(name: str, layer: nn.Module):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].double()
            x = x.movedim(-layer.weight.ndim + 1, -1) if not isinstance(layer, nn.Linear) else x  # pyright: ignore
            square = x.flatten(0, -2).square().sum(0)
            sums[name] = sums[name] + square if name in sums else square

        return hook

    layers = {n: m for n, m in survey(model)[0].items() if getattr(m, "groups", 1) == 1}
    handles = [layer.register_forward_pre_hook(measure(name, layer)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for batch in batches_of(data, "input norms", progress=progress):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: total.sqrt().to(layers[name].weight.dtype).view(1, -1, *[1] * (layers[name].weight.ndim - 2))
        for name, total in sums.items()
    }


def accuracy_by_sparsity(
    dense: nn.Module,
    data: Iterable[Any],
    test: Iterable[Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    method: str = "auto",
    samples: int | None = None,
    progress: bool | None = None,
) -> Table:
    """Accuracy of layer-wise magnitude pruning with and without renormalization, a row a sparsity.

    The dense model is measured once for all of them.

    Args:
        dense: a classifier; left as it is.
        data: calibration data.
        test: (inputs, targets) to evaluate on.
        sparsities: shares of every layer's weights to prune.
        method, samples: see :func:`fastmatch.renormalize`.
        progress: show a bar; None shows it on a terminal.
    """
    statistics = endpoint_statistics([dense], data, samples=samples, progress=False)
    options = Renormalization(method, samples=samples)  # pyright: ignore[reportArgumentType]
    layers = survey(dense)[0]
    rows = []
    for amount in progress_bar(sparsities, "pruning", show=progress):
        masks = {name: mask_of(layer.weight.abs(), amount) for name, layer in layers.items()}
        pruned = pruned_copy(dense, masks)
        new = renormalize(pruned, statistics, data, options, weights=[1.0], progress=False)
        (loss, accuracy), (new_loss, new_accuracy) = (
            evaluate(model, test, progress=False) for model in (pruned, new)
        )
        rows.append(
            {
                "sparsity": amount, "loss": loss, "accuracy": accuracy,
                "renormalized loss": new_loss, "renormalized accuracy": new_accuracy,
            }
        )  # fmt: skip
    return Table(tuple(rows))
