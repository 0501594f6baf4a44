"""Pruners by second-order information: the optimal brain surgeon with layerwise Hessians (SparseGPT) and with the Fisher (WoodFisher).

Both remove the weights whose loss costs least, and change those that stay to make up for them. Under a quadratic loss with Hessian H, removing
the weights Q costs least with ``H_RR d_R = H_RQ w_Q`` for the others, R (Hassibi and Stork 1993).

Sources: Frantar and Alistarh 2023 (SparseGPT); Singh and Alistarh 2020 (WoodFisher).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import batches_of, default_forward, evaluating
from fastmatch._internal.checks import check_integer, check_number
from fastmatch._internal.layer_calls import on_call
from fastmatch._internal.modules import copy_module
from fastmatch.renorm.layers import by_outputs, survey
from fastmatch.renorm.least_squares import LayerFit
from fastmatch.statistics.fisher import gradients_by_sample
from fastmatch.studies.pruning import mask_of

__all__ = ["SparseGPT", "WoodFisher", "surgeon", "woodbury_saliency", "woodbury_update"]


@dataclass(frozen=True, eq=False)
class SparseGPT:
    """A pruner of layer after layer, with the Hessian of each layer's squared output error on data.

    A layer's inputs are those that the layers before it give after they are pruned. Its columns are pruned from the first to the
    last: what a weight loses is moved to the columns after it. Which weights go is decided for some columns at a time, so that
    it follows what was moved.

    Example:
        >>> from fastmatch.studies.pruning import sparsity
        >>> from fastmatch.studies.second_order import SparseGPT
        >>> pruned = SparseGPT(loader, samples=64)(model_a, 0.5)
        >>> round(sparsity(pruned), 1)
        0.5

    Args:
        data: calibration data, read once for each network; all batches are held.
        samples: use this many from the front of the data; None takes all.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        block: columns whose weights are chosen together; within them, the fraction that goes is the same everywhere.

    Cost: one forward pass over the data for the order of the layers, then one and an inversion of a (features, features) matrix
    for each layer.
    """

    data: Iterable[Any] = field(repr=False)
    samples: int | None = None
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        check_number("damping", self.damping, exclusive=True)
        check_integer("block", self.block, least=1)

    @torch.no_grad()
    def __call__(self, dense: nn.Module, amount: float) -> nn.Module:
        """Return a pruned copy of ``dense`` in which about the fraction ``amount`` of the weights is zero."""
        new = copy_module(dense)
        batches = list(batches_of(self.data, "SparseGPT", samples=self.samples, progress=False))
        layers = survey(new)[0]
        for name, layer in layers.items():
            if "weight" not in dict(layer.named_parameters(recurse=False)):
                raise ValueError(
                    f"dense: the weight of {name!r} is computed from another tensor; make it permanent first"
                )
        order: list[str] = []
        handles = [on_call(layer, lambda *_, name=name: order.append(name)) for name, layer in layers.items()]
        with evaluating(new):
            try:
                for batch in batches:
                    default_forward(new, batch)
            finally:
                for handle in handles:
                    handle.remove()
            if missing := [name for name in layers if name not in order]:
                raise ValueError(
                    f"data: these layers never run as modules on it, so they cannot be pruned: {', '.join(missing)}"
                )
            for name in dict.fromkeys(order):
                layer = layers[name]
                fit = LayerFit(name, layer)
                handle = on_call(layer, fit.add)
                try:
                    for batch in batches:
                        default_forward(new, batch)
                finally:
                    handle.remove()
                weight = by_outputs(layer, layer.weight)
                hessians = damped(torch.stack(fit.second_moments()), self.damping).to(weight.device)
                parts = weight.double().reshape(len(hessians), -1, hessians.shape[-1])
                weight.copy_(surgeon(parts, hessians, amount, self.block).reshape(weight.shape))
        return new


def damped(hessians: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (groups, n, n) Hessians that can be inverted: ``damping`` of their mean diagonal is added, or one if all are zero.

    The mean is over all groups, so that a group without input costs little.
    """
    scale = float(hessians.diagonal(dim1=-2, dim2=-1).mean())
    return hessians + (damping * scale if scale > 0 else 1.0) * torch.eye(hessians.shape[-1]).to(hessians)


def surgeon(weight: torch.Tensor, hessian: torch.Tensor, amount: float, block: int) -> torch.Tensor:
    """Return a pruned weight whose later columns make up for what earlier ones lose.

    For column j, with ``C = (H[j:, j:])^-1``, a weight's saliency is ``w_j^2 / C_00``. If it goes, the weights of its row from
    column j on lose ``w_j C_0 / C_00``.

    Args:
        weight: (groups, outputs, features) float64.
        hessian: (groups, features, features), positive definite.
        amount: fraction that goes, of each block of columns.
        block: columns that are chosen together in all groups, by the weights that they have after all columns before them.
    """
    weight = weight.clone()
    # Row j of the upper Cholesky factor of H^-1 is C_0 / sqrt(C_00) of column j.
    rows = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    diagonals = rows.diagonal(dim1=1, dim2=2)
    gone = 0
    for start in range(0, weight.shape[2], block):
        stop = min(start + block, weight.shape[2])
        saliency = (weight[:, :, start:stop] / diagonals[:, None, start:stop]).square()
        # Counted from the first column, so that the rounding of many small blocks does not add up.
        count = round(amount * weight[:, :, :stop].numel()) - gone
        goes, gone = ~mask_of(saliency, count / saliency.numel()), gone + count
        for j in range(start, stop):
            lost = torch.where(goes[:, :, j - start], weight[:, :, j] / diagonals[:, j, None], 0.0)
            weight[:, :, j:] -= lost[:, :, None] * rows[:, j, None, j:]
            weight[:, :, j][goes[:, :, j - start]] = 0
    return weight


@dataclass(frozen=True, eq=False)
class WoodFisher:
    """A pruner of all layers at once, with the inverse of the empirical Fisher information of each.

    The Fisher information of a layer is ``damping I + mean of g g^T`` over the gradients g of single samples. It is never formed: by
    Woodbury's identity, as many numbers as samples times weights are enough. The weights with the least saliency
    ``w^2 / (2 [F^-1]_qq)`` become zero, compared over all layers. Those that stay move to the minimum of the quadratic loss. (The
    published code adds up what each removal asks for alone, in blocks of a layer.)

    Example:
        >>> from fastmatch.studies.pruning import sparsity
        >>> from fastmatch.studies.second_order import WoodFisher
        >>> pruned = WoodFisher(loader, samples=64)(model_a, 0.5)
        >>> round(sparsity(pruned), 1)
        0.5

    Args:
        data: batches of (inputs, targets), read once for each network.
        samples: use this many from the front of the data; None takes all. All their gradients are held.
        damping: of the Fisher information.
        by_layer: prune the same fraction of each layer, instead of comparing all.
    """

    data: Iterable[Any] = field(repr=False)
    samples: int | None = 256
    damping: float = 1e-5
    by_layer: bool = False

    def __post_init__(self) -> None:
        check_number("damping", self.damping, exclusive=True)

    def __call__(self, dense: nn.Module, amount: float) -> nn.Module:
        """Return a pruned copy of ``dense`` in which about the fraction ``amount`` of the weights is zero."""
        new = copy_module(dense)
        layers, known = survey(new)[0], dict(new.named_parameters())
        names = {f"{name}.weight" if name else "weight": layer for name, layer in layers.items()}
        for name in names:
            if name not in known:
                raise ValueError(
                    f"dense: {name!r} is computed from another tensor, so its gradient is not known"
                )
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for found in gradients_by_sample(new, self.data, samples=self.samples, title="WoodFisher"):
            for name, rows in parts.items():
                rows.append(found[name].flatten(1))
        gradients = {name: torch.cat(parts.pop(name)).double() for name in names}
        weights = {name: known[name].detach().double().flatten() for name in names}
        saliency = {n: woodbury_saliency(weights[n], gradients[n], self.damping) for n in names}
        if self.by_layer:
            keeps = [mask_of(s, amount) for s in saliency.values()]
        else:
            sizes = [len(s) for s in saliency.values()]
            keeps = list(mask_of(torch.cat(list(saliency.values())), amount).split(sizes))
        with torch.no_grad():
            for name, keep in zip(names, keeps, strict=True):
                pruned = woodbury_update(weights[name], gradients[name], keep, self.damping)
                known[name].copy_(pruned.view_as(known[name]))
        return new


def woodbury_saliency(weight: torch.Tensor, gradients: torch.Tensor, damping: float) -> torch.Tensor:
    """Return ``w^2 / (2 [F^-1]_qq)`` of every weight, ``F = damping I + G^T G / samples``.

    Args:
        weight: (n,) float64.
        gradients: G, (samples, n) float64.
        damping: positive.
    """
    factor = torch.linalg.cholesky(_gram(gradients, damping))
    inner = torch.linalg.solve_triangular(factor, gradients, upper=False)
    inverse = (1 - inner.square().sum(0)) / damping  # F^-1 = (I - G^T K^-1 G) / damping
    return weight.square() / (2 * inverse.clamp(min=1e-300))


def woodbury_update(
    weight: torch.Tensor, gradients: torch.Tensor, keep: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return the weight without what is not kept, the rest changed to the least of the quadratic loss.

    This is ``w_R + F_RR^-1 F_RQ w_Q``, which equals ``w_R + G_R^T K_R^-1 G_Q w_Q`` with ``K_R = samples damping I + G_R G_R^T``.

    Args:
        weight, gradients, damping: see :func:`woodbury_saliency`.
        keep: (n,) True for the weights R that stay.
    """
    stays, goes = gradients[:, keep], gradients[:, ~keep]
    new = torch.zeros_like(weight)
    lost = goes @ weight[~keep]
    new[keep] = weight[keep] + stays.T @ torch.linalg.solve(_gram(stays, damping), lost)
    return new


def _gram(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    count = len(gradients)
    return gradients @ gradients.T + count * damping * torch.eye(count).to(gradients)
