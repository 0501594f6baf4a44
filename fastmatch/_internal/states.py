"""Reading models and state dicts alike, and the checks that come before any work on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import nn

__all__ = ["State", "check_finite", "check_same_architecture", "headers_of", "state_of"]

State: TypeAlias = Mapping[str, torch.Tensor]


def state_of(model: nn.Module | State, argument: str) -> dict[str, torch.Tensor]:
    """The named tensors of a model or state dict, detached, sharing its memory."""
    if isinstance(model, nn.Module):
        items = model.state_dict(keep_vars=False)
    elif isinstance(model, Mapping):
        items = model
    else:
        raise TypeError(f"{argument}: expected a torch module or a state dict, got {type(model).__name__}")
    state = {}
    for name, tensor in items.items():
        if isinstance(tensor, torch.Tensor):
            state[name] = tensor.detach()
        elif not name.endswith("_extra_state"):
            raise TypeError(f"{argument}: entry {name!r} is {type(tensor).__name__}, expected a tensor")
    if not state:
        raise ValueError(f"{argument}: has no parameters or buffers")
    return state


def headers_of(state: State) -> State:
    """What shapes and types are read from: a state that lies on disk has ``headers`` without values."""
    return getattr(state, "headers", state)


def check_same_architecture(a: State, b: State, name_a: str = "model_a", name_b: str = "model_b") -> None:
    """ValueError at the first tensor that the two do not share by name and shape."""
    wrapped = [all(name.startswith("module.") for name in state) for state in (a, b)]
    if wrapped[0] != wrapped[1]:
        raise ValueError(
            f"{name_a if wrapped[0] else name_b}: every name starts with 'module.', as DistributedDataParallel "
            "and DataParallel leave them, the other's do not; give the wrapped model (model.module)"
        )
    for name, tensor in a.items():
        if name not in b:
            raise ValueError(
                f"{name_b}: has no tensor {name!r}, which {name_a} has; architectures must be equal"
            )
        if b[name].shape != tensor.shape:
            raise ValueError(
                f"{name_b}: tensor {name!r} has shape {tuple(b[name].shape)}, "
                f"{name_a} has {tuple(tensor.shape)}; architectures must be equal"
            )
    extra = [name for name in b if name not in a]
    if extra:
        raise ValueError(
            f"{name_b}: has tensor {extra[0]!r}, which {name_a} has not; architectures must be equal"
        )


def check_finite(state: State, argument: str) -> None:
    """ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        # One read and no mask: a sum is finite only if every term is, short of overflow; then look closely.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(f"{argument}: tensor {name!r} holds {bad} NaN or infinite values")
