"""The layers of a model that can be renormalized, and the reason for each that cannot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastmatch.renorm.norms import is_norm

__all__ = ["Layer", "bias_mask", "by_outputs", "channel_dim", "raw_bias", "raw_weight", "survey"]

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is (inputs, outputs)."""
    weight, outputs = getattr(module, "weight", None), getattr(module, "nf", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, torch.Tensor):
        return False
    return weight.ndim == 2 and outputs == weight.shape[1]


def by_outputs(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a view of a layer's weight whose rows are the output channels; its own inverse."""
    return weight.T if is_transposed_linear(layer) else weight


def survey(model: nn.Module, layers: Sequence[str] | None = None) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return (layers to renormalize, modules left alone with the reason), both by name.

    Linear (GPT-2's Conv1D too) and convolution layers are renormalized, including pruned ones (torch.nn.utils.prune, or a mask as a
    parametrization) and those under torch.nn.utils.parametrizations.weight_norm. Left alone are transposed convolutions, other modules with parameters of their own (except norms), layers
    whose weight or bias another module shares, and parametrized weights that do not scale with their rows.

    Of a module that holds others, the loose parameters are listed.

    Raises:
        ValueError: ``layers`` names something that cannot be renormalized, or no layer can be.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    found: dict[str, Layer] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) or is_transposed_linear(module):
            weight = raw_weight(module)
            if weight is None:
                left[name] = _why_no_rows(module)
            else:
                inside = f"{name}." if name else ""  # where parametrizations keep their tensors
                for kind, parameter in (("weight", weight), ("bias", raw_bias(module))):
                    holders = owners.get(id(parameter), ())
                    others = [n for n in holders if n != name and not n.startswith(inside)]
                    if others:
                        left[name] = f"shares its {kind} with {', '.join(others)}"
                        break
                else:
                    found[name] = module  # type: ignore[assignment] - GPT-2's is taken as a linear layer
        elif not (
            getattr(
                module, "is_unit_map", False
            )  # joins the models of a partial merge; its output is no layer's
            or isinstance(module, parametrize.ParametrizationList)
        ):
            own = [n for n, _ in module.named_parameters(recurse=False)]
            if not own or is_norm(module):
                continue
            kind = type(module).__name__
            if isinstance(module, _TRANSPOSED):
                left[name or "(model)"] = "transposed convolutions are not renormalized"
            elif not any(True for _ in module.children()):
                left[name or "(model)"] = f"{kind} is not a linear or convolution layer"
            else:  # what the module holds is renormalized, only these are not
                path = f"{name}." if name else ""
                left |= {path + n: f"is a parameter of {kind}, no linear or convolution layer" for n in own}
    if layers is not None:
        for name in layers:
            if name not in found:
                reason = left.get(name, "is not a linear or convolution layer")
                raise ValueError(f"layers: {name!r} {_sentence(reason)}; there are {list(found)}")
        found = {n: found[n] for n in found if n in set(layers)}
    if not found:
        reasons = "".join(f"; {name}: {reason}" for name, reason in list(left.items())[:3])
        raise ValueError(f"model: has no linear or convolution layer to renormalize{reasons}")
    return found, left


def _sentence(reason: str) -> str:
    return reason if reason.startswith(("is ", "shares")) else f"is left alone: {reason}"


def raw_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return the parameter whose rows scale the layer's output channels, or None.

    This is the weight itself; ``weight_orig`` under a mask of torch.nn.utils.prune; or an original of a
    parametrization that scales with its rows, as under a mask, or the norms of torch's weight norm. The latter is tested on a copy.
    """
    own = dict(layer.named_parameters(recurse=False))
    if "weight" in own:
        return own["weight"]
    if "weight_orig" in own and isinstance(getattr(layer, "weight_mask", None), torch.Tensor):
        return own["weight_orig"]
    for name, original in _originals(layer).items():
        if _scales_with_rows(layer, name):
            return original
    return None


def _originals(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors from which a parametrization computes the weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return {}
    of_weight: Any = layer.parametrizations.weight  # pyright: ignore[reportAttributeAccessIssue]
    return dict(of_weight.named_parameters(recurse=False))


def _why_no_rows(layer: nn.Module) -> str:
    if parametrize.is_parametrized(layer, "weight"):
        return (
            "its parametrized weight does not scale with its rows; "
            'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight") makes it permanent'
        )
    return (
        "its weight is computed by a hook; use torch.nn.utils.parametrizations, or make the weight permanent"
    )


def raw_bias(layer: nn.Module) -> nn.Parameter | None:
    """Return the bias of a layer, or what is under its mask (torch.nn.utils.prune); None if it has none."""
    own = dict(layer.named_parameters(recurse=False))
    return own.get("bias", own.get("bias_orig"))


def _scales_with_rows(layer: nn.Module, name: str) -> bool:
    probe: Any = copy.deepcopy(layer).eval()
    original = getattr(probe.parametrizations.weight, name)
    with torch.no_grad():
        before = probe.weight.clone()
        if original.ndim != before.ndim or len(original) != len(before):
            return False
        # All above 1: a weight that is divided by a norm of it then differs by that much, too.
        rows = torch.linspace(2, 8, len(before), device=before.device, dtype=before.dtype)
        rows = rows.view(-1, *[1] * (before.ndim - 1))
        original.mul_(rows)
        return torch.allclose(probe.weight, before * rows, rtol=1e-2)


def bias_mask(layer: nn.Module) -> torch.Tensor | None:
    """Return the mask of a pruned bias (torch.nn.utils.prune), whose zeros must stay, or None."""
    mask = getattr(layer, "bias_mask", None)
    return mask if isinstance(mask, torch.Tensor) else None


def channel_dim(layer: nn.Module, output: torch.Tensor) -> int:
    """Return the channel dimension of a layer's output: last for linear, before the positions for convolution."""
    if isinstance(layer, nn.Conv1d):
        return output.ndim - 2
    if isinstance(layer, nn.Conv2d):
        return output.ndim - 3
    if isinstance(layer, nn.Conv3d):
        return output.ndim - 4
    return output.ndim - 1
