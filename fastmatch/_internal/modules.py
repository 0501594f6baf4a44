"""Copies of modules, and copies that hold other tensors.

Copies are made outside of inference mode, whose tensors could not be trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from fastmatch._internal.divided import is_fsdp
from fastmatch._internal.states import State

__all__ = ["copy_module", "to_eval_mode", "with_state"]


def to_eval_mode(model: nn.Module) -> nn.Module:
    """Put a module in eval mode and return it; an exported program has one mode, in which it was exported."""
    try:
        return model.eval()
    except NotImplementedError:
        return model


@torch.inference_mode(False)
def copy_module(model: nn.Module, memo: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """Return a deep copy, also of modules that hold computed tensors, as torch.nn.utils.prune leaves them.

    Of a module that FSDP2 divides all ranks make the copy, which is divided too.

    ``memo`` maps ids of tensors to what replaces them, as for :func:`copy.deepcopy`.
    """
    memo = dict(memo or {})
    if is_fsdp(model):
        from fastmatch._internal.fsdp_copies import copy_fsdp

        return copy_fsdp(model, memo)
    for module in model.modules():
        for tensor in _tensors_in(list(vars(module).values())):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
        graph = getattr(module, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            memo |= {id(tensor): tensor for tensor in _tensors_in(list(node.meta.values()))}  # without values
    copied = copy.deepcopy(model, memo)
    _bind_replaced_forwards(model, copied)
    return copied


def _bind_replaced_forwards(model: nn.Module, copied: nn.Module) -> None:
    """Let ``forward`` attributes of a copy use the copy: functions are not copied, and so neither is what they hold.

    ``module.forward = torch.compile(module.forward)`` becomes the method itself.

    Raises:
        TypeError: a function that replaced ``forward`` holds a module of the original.
    """
    originals = {id(module) for module in model.modules()}
    for (name, module), own in zip(model.named_modules(), copied.modules(), strict=True):
        function = vars(own).get("forward")
        if function is None or function is not vars(module).get("forward"):
            continue
        held = [part for part in _held_by(function) if id(getattr(part, "__self__", part)) in originals]
        is_compiled = hasattr(function, "_torchdynamo_orig_callable")
        if (
            is_compiled
            and held
            and all(isinstance(part, MethodType) and part.__self__ is module for part in held)
        ):
            vars(own)["forward"] = MethodType(held[0].__func__, own)
        elif held:
            raise TypeError(
                f"model: forward of {name or 'the model'!r} was replaced by a function that holds the module; a copy of the model "
                "would run with the original's weights. Give the model without it, or set it as a method: "
                "types.MethodType(function, module)"
            )


def _held_by(function: object, depth: int = 4) -> Iterator[Any]:
    """Yield what a function closes over, has as defaults or as attributes, and what functions among these do."""
    if not depth or not isinstance(function, FunctionType):
        return
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    for part in (*cells, *(function.__defaults__ or ()), *vars(function).values()):
        yield part
        yield from _held_by(part, depth - 1)


def _tensors_in(value: object) -> list[torch.Tensor]:
    """Return the tensors in lists, tuples and dicts, where models keep what they have computed."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


@torch.inference_mode(False)
def with_state(model: nn.Module, state: State) -> nn.Module:
    """Return a copy of ``model`` that holds ``state``; tied parameters stay tied.

    The copy shares the tensors of ``state`` that have the model's layout. Copying the old values first and
    overwriting them would take as much time and memory as the whole merge.
    """
    old = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    taken: dict[int, torch.Tensor] = {}
    for name, tensor in old.items():
        new = state[name].clone() if state[name].is_inference() else state[name]
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
