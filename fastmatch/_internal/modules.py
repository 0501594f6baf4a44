"""Copies of modules, and copies that hold other tensors.

Copies are made outside of inference mode, whose tensors could not be trained.
"""

from __future__ import annotations

import copy
import dis
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
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
def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy, also of modules that hold computed tensors, as torch.nn.utils.prune leaves them.

    Of a module that FSDP2 divides all ranks make the copy, which is divided too.

    ``memo`` maps ids of tensors to what replaces them, as for :func:`copy.deepcopy`.
    """
    memo = dict(memo or {})
    if is_fsdp(model):
        from fastmatch._internal.fsdp_copies import copy_fsdp

        return copy_fsdp(model, memo)
    for module in model.modules():
        # A dozen tables of hooks, mostly empty, take two thirds of a copy: an OrderedDict is copied through its pickle.
        memo |= {id(v): OrderedDict() for v in vars(module).values() if type(v) is OrderedDict and not v}
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
        TypeError: what replaced ``forward`` still holds a module or a tensor of the original.
    """
    originals = _parts_of(model) - _parts_of(copied)
    for (name, module), own in zip(model.named_modules(), copied.modules(), strict=True):
        function = vars(own).get("forward")
        method = _compiled_from(function)
        if isinstance(method, MethodType) and method.__self__ is module:
            function = vars(own)["forward"] = MethodType(method.__func__, own)
        if any(id(part) in originals for part in _reached_from(function)):
            raise TypeError(
                f"model: forward of {name or 'the model'!r} was replaced by a function that holds the module; a copy of the model "
                "would run with the original's weights. Give the model without it, or set it as a method: "
                "types.MethodType(function, module)"
            )


def _compiled_from(function: object) -> object:
    """Return what torch.compile was given, if the function is what it returned."""
    while isinstance(function, FunctionType) and _is_of_torch(function.__globals__.get("__name__", "")):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def _parts_of(model: nn.Module) -> set[int]:
    """Return the ids of modules, parameters and buffers."""
    return {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}


def _reached_from(value: object) -> Iterator[object]:
    """Yield what a call of ``value`` may use: what functions close over, have as defaults or attributes or find by a global name, what
    partial functions are given, what methods are bound to, and what containers and objects among these hold.

    What modules hold is not yielded, nor what is in objects of torch.
    """
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, FunctionType):
            waiting += [cell.cell_contents for cell in part.__closure__ or () if cell != CellType()]
            waiting += [
                *(part.__defaults__ or ()),
                *(part.__kwdefaults__ or {}).values(),
                *vars(part).values(),
            ]
            waiting += _globals_of(part)
        elif isinstance(part, MethodType):
            waiting += [part.__self__, part.__func__]
        elif isinstance(part, partial):
            waiting += [part.func, *part.args, *part.keywords.values(), *vars(part).values()]
        elif isinstance(part, Mapping):
            waiting += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif isinstance(part, weakref.ref):
            waiting.append(part())
        elif not isinstance(part, (nn.Module, type, ModuleType)) and not _is_of_torch(type(part).__module__):
            waiting += getattr(part, "__dict__", {}).values()


def _globals_of(function: FunctionType) -> list[object]:
    """Return what a function finds by global names: modules, tensors, and functions of the same file."""
    waiting, found = [function.__code__], list[object]()
    while waiting:
        code = waiting.pop()
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        named = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        found += [function.__globals__[name] for name in named if name in function.__globals__]
    kinds = (nn.Module, torch.Tensor, MethodType, partial)
    return [
        part
        for part in found
        if isinstance(part, kinds)
        or (isinstance(part, FunctionType) and part.__module__ == function.__module__)
    ]


def _is_of_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


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
