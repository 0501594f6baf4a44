"""Copies of modules, and copies that hold other tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastmatch._internal.states import State

__all__ = ["copy_module", "with_state"]


def copy_module(model: nn.Module, memo: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """Return a deep copy, also of modules that hold computed tensors, as torch.nn.utils.prune leaves them.

    ``memo`` maps ids of tensors to what replaces them, as for :func:`copy.deepcopy`.
    """
    memo = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """Return a copy of ``model`` that holds ``state``; tied parameters stay tied.

    The copy shares the tensors of ``state`` that have the model's layout. Copying the old values first and
    overwriting them would take as much time and memory as the whole merge.
    """
    old = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    taken: dict[int, torch.Tensor] = {}
    for name, tensor in old.items():
        new = state[name]
        if type(tensor) in (torch.Tensor, nn.Parameter) and _same_layout(tensor, new):
            is_parameter = isinstance(tensor, nn.Parameter)
            taken.setdefault(id(tensor), nn.Parameter(new, tensor.requires_grad) if is_parameter else new)
    copied = copy_module(model, taken)
    with torch.no_grad():
        for name, tensor in copied.state_dict().items():
            if isinstance(tensor, torch.Tensor) and id(old[name]) not in taken:
                tensor.copy_(state[name])
    return copied


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether ``b`` can replace ``a``: it differs only in values and has its own memory."""
    alike = all(getattr(a, what) == getattr(b, what) for what in ("shape", "dtype", "device", "layout"))
    return alike and a.stride() == b.stride() and a.data_ptr() != b.data_ptr()
