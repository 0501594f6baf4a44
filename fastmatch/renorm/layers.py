"""Which layers of a model can be renormalized, and which are left alone and why."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["BATCH_NORMS", "NORMS", "Layer", "bias_mask", "channel_dim", "raw_weight", "survey"]

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OTHER_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
)
NORMS = (*BATCH_NORMS, *_OTHER_NORMS)


def is_norm(module: nn.Module) -> bool:
    """A norm of torch, or a module named like one that holds vectors only (RMSNorm as models bring their own)."""
    if isinstance(module, NORMS):
        return True
    named = type(module).__name__.lower().endswith("norm")
    return named and all(p.ndim <= 1 for p in module.parameters(recurse=False))


def survey(model: nn.Module, layers: Sequence[str] | None = None) -> tuple[dict[str, Layer], dict[str, str]]:
    """(layers to renormalize, layers left alone with the reason), both by name.

    Linear and convolution layers are renormalized, pruned ones (torch.nn.utils.prune, or a mask as a
    parametrization) included. Left alone: other modules with parameters of their own, norms aside; weights
    that several modules share; parametrizations that do not scale with their rows.

    Raises:
        ValueError: ``layers`` names something that cannot be renormalized, or nothing is left.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            weight = raw_weight(module)
            if weight is None:
                left[name] = "its parametrized weight does not scale with its rows"
            elif len(owners.get(id(weight), ())) > 1:
                others = [n for n in owners[id(weight)] if n != name]
                left[name] = f"shares its weight with {', '.join(others)}"
            else:
                found[name] = module
        elif not (is_norm(module) or isinstance(module, parametrize.ParametrizationList)):
            own = [n for n, _ in module.named_parameters(recurse=False)]
            if own:
                left[name or "(model)"] = f"{type(module).__name__} is no linear or convolution layer"
    if layers is not None:
        for name in layers:
            if name not in found:
                reason = left.get(name, "is no linear or convolution layer")
                raise ValueError(f"layers: {name!r} {_sentence(reason)}; there are {list(found)}")
        found = {n: found[n] for n in found if n in set(layers)}
    if not found:
        raise ValueError("model: has no linear or convolution layer to renormalize")
    return found, left


def _sentence(reason: str) -> str:
    return reason if reason.startswith(("is ", "shares")) else f"is left alone: {reason}"


def raw_weight(layer: nn.Module) -> nn.Parameter | None:
    """The parameter whose rows scale the layer's output channels; None where there is none.

    The weight itself; ``weight_orig`` under a mask of torch.nn.utils.prune; the original of a
    parametrization that is found, on a copy, to scale with its rows, as a mask does.
    """
    own = dict(layer.named_parameters(recurse=False))
    if "weight" in own:
        return own["weight"]
    if "weight_orig" in own and isinstance(getattr(layer, "weight_mask", None), torch.Tensor):
        return own["weight_orig"]
    if parametrize.is_parametrized(layer, "weight"):
        original = getattr(layer.parametrizations.weight, "original", None)  # pyright: ignore[reportAttributeAccessIssue]
        if original is not None and _scales_with_rows(layer):
            return original
    return None


def _scales_with_rows(layer: nn.Module) -> bool:
    probe: Any = copy.deepcopy(layer).eval()
    original = probe.parametrizations.weight.original
    with torch.no_grad():
        before = probe.weight.clone()
        if original.shape != before.shape:
            return False
        rows = torch.linspace(0.5, 2, len(before), device=before.device, dtype=before.dtype)
        rows = rows.view(-1, *[1] * (before.ndim - 1))
        original.mul_(rows)
        return torch.allclose(probe.weight, before * rows, rtol=1e-2)


def bias_mask(layer: nn.Module) -> torch.Tensor | None:
    """The mask of a pruned bias (torch.nn.utils.prune), whose zeros have to stay."""
    mask = getattr(layer, "bias_mask", None)
    return mask if isinstance(mask, torch.Tensor) else None


def channel_dim(layer: nn.Module, output: torch.Tensor) -> int:
    """Where the channels of a layer's output lie: last for linear, before the positions for convolution."""
    if isinstance(layer, nn.Conv1d):
        return output.ndim - 2
    if isinstance(layer, nn.Conv2d):
        return output.ndim - 3
    if isinstance(layer, nn.Conv3d):
        return output.ndim - 4
    return output.ndim - 1
