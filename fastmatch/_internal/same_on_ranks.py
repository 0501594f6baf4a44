"""The check that all ranks were given the same models and options, before they share any work.

Without it, ranks that were given different models would each compute a part of the result, and nobody would see that it
is a blend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmatch._internal.divided import division_of
from fastmatch._internal.ranks import Ranks, is_divided
from fastmatch._internal.shared_data import checksum

__all__ = ["check_same_on_ranks"]

PLAIN = (str, int, float)

READ_LATER = ("data", "probes")
"""Fields of an option that are not compared here: batches, where they are shared, are compared as they are read."""

Model: TypeAlias = nn.Module | Mapping[str, torch.Tensor]


def check_same_on_ranks(
    ranks: Ranks,
    call: str,
    options: Mapping[str, object] | None = None,
    models: Mapping[str, Model] | None = None,
) -> None:
    """Raise ValueError on all ranks if one has another model or option than rank 0; the first difference is named.

    Args:
        ranks: the processes, all of which make the call.
        call: the name of the public function, for errors.
        options: name of an argument -> its value. Numbers, words, tensors, specs and what is made of them are compared by value,
            functions by name, other objects by type.
        models: name of an argument -> a module or state dict. Names, types, shapes and values are compared. Of tensors that
            are divided, which each rank has another part of, the division is compared instead of values.

    Cost: one pass over the models if there are several ranks, less than a forward pass of 32 samples through linear layers on a CPU;
    tensors on a GPU are copied to the host one by one. What is sent are 64 characters, and tables only if there is a difference.
    """
    if ranks.size == 1:
        return
    marks: dict[str, object] = {name: _described(value) for name, value in (options or {}).items()}
    for argument, model in (models or {}).items():
        marks |= {f"{argument}: tensor {name!r}": mark for name, mark in _marks(model).items()}
    place = f"the arguments of {call}"
    digest = hashlib.sha256(repr(marks).encode()).hexdigest()
    if len(set(ranks.exchange(digest, place))) == 1:
        return
    first, *others = ranks.exchange(marks, place)
    for rank, found in enumerate(others, start=1):
        names = dict.fromkeys([*first, *found])
        other = next((name for name in names if found.get(name) != first.get(name)), None)
        if other is not None:
            raise ValueError(
                f"{call}: {other} is not the same on ranks 0 and {rank}; all ranks must be given the same models and "
                "options (a block of fm.alone() keeps a call to one rank)"
            )


def _marks(model: Model) -> dict[str, object]:
    """Return what must be equal on all ranks, by the name of a tensor."""
    if isinstance(model, Mapping):
        return {name: _mark(tensor) for name, tensor in model.items()}
    if not isinstance(model, nn.Module):  # the call refuses it
        return {"": type(model).__name__}
    if division_of(model) is not None:
        # Its state dict would be gathered, and a rank may have nothing of a tensor.
        return {name: (str(p.dtype), getattr(p, "ds_shape", None)) for name, p in model.named_parameters()}
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        # It copies the buffers of rank 0 before a forward pass.
        buffers = {name for name, _ in model.named_buffers()}
        state = {name: t for name, t in state.items() if name not in buffers}
    return {name: _mark(tensor) for name, tensor in state.items()}


def _mark(tensor: torch.Tensor) -> object:
    if not is_divided(tensor):
        return checksum(tensor)
    divided: Any = tensor
    mesh = divided.device_mesh  # other ranks may be in another part of a larger one
    return (
        tuple(divided.shape),
        str(divided.dtype),
        str(divided.placements),
        tuple(mesh.shape),
        mesh.mesh_dim_names,
    )


def _described(value: Any) -> object:
    """Return what can be compared of an option's value."""
    if value is None or isinstance(value, (*PLAIN, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape)) if value.is_meta else checksum(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return [(repr(key), _described(part)) for key, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return type(value).__name__, [(k, _described(v)) for k, v in named.items() if k not in READ_LATER]
    if isinstance(value, (list, tuple)) and all(isinstance(x, (*PLAIN, list, tuple)) for x in value):
        return [_described(part) for part in value]
    if isinstance(value, partial):
        return "partial", _described(value.func), _described(value.args), _described(value.keywords)
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__module__", ""), getattr(value, "__qualname__", type(value).__name__)
    return type(value).__name__
