"""Operations that a trace does not compute: their results get memory of the right shape, and no numbers.

Labels come from operations and shapes. So whatever depends on parameters is left out, which saves a forward pass, and its
memory is never touched. Numbers that depend on no parameter, such as masks and positions, are computed as usual.

Some traces need numbers: a model branches on its activations, the shape of a result depends on them, or a rule asks
whether they are equal. :class:`ValuesNeeded` then ends the pass, and the caller traces with numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.modules import copy_module
from fastmatch.spec.operations import op_name, tensors_in
from fastmatch.spec.record import Record, ValuesNeeded, storage_id
from fastmatch.spec.rules.elementwise import FACTORIES

__all__ = ["Uncomputed", "can_omit", "form_of", "on_meta", "structure_of"]

LEAST = 1 << 20
"""Parameters from which values are left out: below that, a forward pass takes as long as the trace's own work."""


class Uncomputed:
    """Runs operations and notes whose numbers are left out.

    Args:
        record: of the trace; its ``uncomputed`` has the parameters at first.
    """

    def __init__(self, record: Record) -> None:
        self._memory = record.uncomputed
        # Blocks of a network repeat: what a result looks like is found once for all of them.
        self._known: dict[Any, Any] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation returns, computed only if all of its operands were.

        Raises:
            ValuesNeeded: the result is no tensor, or its shape depends on numbers that were not computed.
        """
        operands = tensors_in((args, kwargs))
        if not any(map(self._lacks, operands)):
            return func(*args, **kwargs)
        if _is_free(func):
            return func(*args, **kwargs)
        if _returns_numbers(func):
            raise ValuesNeeded(func.name())
        if _depends_on_values(func):
            places = [t for t in operands if not t.is_floating_point() and not t.is_complex()]
            if not places or any(map(self._lacks, places)):
                raise ValuesNeeded(func.name())
            out = func(*args, **kwargs)
        else:
            out = self._allocated(func, args, kwargs)
        written = [
            kwargs.get(argument.name, args[k] if k < len(args) else None)
            for k, argument in enumerate(func._schema.arguments)
            if argument.is_write
        ]
        self._memory.update(map(storage_id, [*tensors_in(out), *tensors_in(written)]))
        return out

    def _lacks(self, tensor: torch.Tensor) -> bool:
        """Whether the numbers of a tensor were not computed."""
        return storage_id(tensor) in self._memory

    def _allocated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return memory for the result; an operand that is written to is returned as it is."""
        operands = tensors_in((args, kwargs))
        first = {id(t): k for k, t in reversed(list(enumerate(operands)))}
        key = func, form_of(args), form_of(kwargs), tuple(first[id(t)] for t in operands)
        if key not in self._known:
            meta: dict[int, torch.Tensor] = {}
            try:
                shaped = func(*on_meta(args, meta), **on_meta(kwargs, meta))
            except (
                Exception
            ) as error:  # it has no rule for shapes, and on made-up numbers it could do anything
                raise ValuesNeeded(func.name()) from error
            given = {id(meta[key]): k for key, k in first.items()}
            self._known[key] = _template(shaped, given)
        return _filled(self._known[key], operands)


@cache
def _returns_numbers(func: Any) -> bool:
    return any("Tensor" not in str(returned.type) for returned in func._schema.returns)


@cache
def _depends_on_values(func: Any) -> bool:
    """Whether the shape of a result may depend on numbers."""
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags))


@cache
def _is_free(func: Any) -> bool:
    """Whether an operation reads no numbers: it makes a view, or asks its operand for a shape only."""
    is_view = func.is_view or torch.Tag.inplace_view in func.tags
    return is_view or op_name(func).partition(".")[2] in ("_unsafe_view", *FACTORIES)


def form_of(value: Any) -> Any:
    """Return all that the shape of a result depends on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(form_of, value))
    if isinstance(value, dict):
        return tuple((name, form_of(part)) for name, part in value.items())
    return type(value), value  # True and 1.0 equal 1, and give other types


def on_meta(value: Any, meta: dict[int, torch.Tensor]) -> Any:
    """Return an argument with tensors on the meta device, noted by the ids of those that they stand for."""
    if isinstance(value, torch.Tensor):
        if id(value) not in meta:
            meta[id(value)] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return meta[id(value)]
    if isinstance(value, (list, tuple)):
        return [on_meta(part, meta) for part in value]
    if isinstance(value, dict):
        return {name: on_meta(part, meta) for name, part in value.items()}
    if isinstance(value, torch.device):
        if value.type != "cpu":
            raise ValuesNeeded("a copy to another device")
        return torch.device("meta")
    return value


class _Parts(NamedTuple):
    """The templates of several results."""

    kind: type
    parts: list[Any]


def _template(shaped: Any, given: dict[int, int]) -> Any:
    """Return what allocates a result: the number of an operand, or a shape, strides and a type."""
    if isinstance(shaped, torch.Tensor):
        if shaped.layout != torch.strided:
            raise ValuesNeeded("a sparse result")
        if id(shaped) in given:
            return given[id(shaped)]
        return shaped.shape, shaped.stride(), shaped.dtype
    if isinstance(shaped, (list, tuple)):
        return _Parts(type(shaped), [_template(part, given) for part in shaped])
    return None


def _filled(template: Any, operands: list[torch.Tensor]) -> Any:
    if template is None or isinstance(template, int):
        return None if template is None else operands[template]
    if isinstance(template, _Parts):
        return template.kind(_filled(part, operands) for part in template.parts)
    shape, stride, dtype = template
    return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")


def can_omit(model: nn.Module, inputs: Iterable[torch.Tensor]) -> bool:
    """Return whether it pays to leave out values, and nobody else sees them.

    There are many parameters, all tensors are plain ones on the CPU, and no hook is given what modules take or return.
    """
    tensors = [*model.parameters(), *model.buffers()]
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    plain = plain and all(type(t) is torch.Tensor and t.device.type == "cpu" for t in inputs)
    is_large = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)) >= LEAST
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    everywhere = (
        torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks
    )
    return plain and is_large and not hooked and not everywhere


def structure_of(model: nn.Module) -> nn.Module:
    """Return a copy that shares all tensors: what a model keeps of a pass without values is thrown away with it.

    Raises:
        Exception: whatever the model's own code raises when it is copied.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy_module(model, shared)
