"""Copies of modules, and modules that take over tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastmatch._internal.states import State

__all__ = ["copy_module", "with_state"]


def copy_module(model: nn.Module, memo: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy, also of modules that hold computed tensors, as torch.nn.utils.prune leaves them.

    ``memo`` says what stands for the tensors of some ids, as for :func:`copy.deepcopy`.
    """
    memo = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of ``model`` that holds ``state``; ties between its parameters stay.

    It takes the tensors of ``state`` over where they are laid out as the model's: a copy of the old values,
    to be overwritten, would cost as much time and memory as the whole merge.
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
    """Whether ``b`` can be put in ``a``'s place: alike in all but values, and in memory of its own."""
    alike = all(getattr(a, what) == getattr(b, what) for what in ("shape", "dtype", "device", "layout"))
    return alike and a.stride() == b.stride() and a.data_ptr() != b.data_ptr()
