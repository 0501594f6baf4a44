"""Copies of modules that torch's ``fully_shard`` (FSDP2) divides, which torch itself does not copy.

The copy is made of the classes and hooks that the module has without the division, and is divided again: unit by unit, so
that at most one unit's parameters are whole, and uninitialized, at a time. Then each rank copies its parts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastmatch._internal.divided import class_undivided, is_fsdp_class, local_part, without_division
from fastmatch._internal.ranks import is_divided

__all__ = ["copy_fsdp"]


def copy_fsdp(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy, divided as the model is; all ranks must make the call.

    Args:
        model: a module of which some parts are divided. It is not changed, except that units that were gathered for a
            forward pass are divided again.
        memo: as for :func:`copy.deepcopy`.

    Raises:
        TypeError: the division is of a kind that cannot be made again, such as that of FSDP2 with tensor parallelism.
    """
    olds = list(model.modules())
    for old in olds:
        if is_fsdp_class(type(old)):
            old.reshard()  # type: ignore[operator]
    memo = dict(memo)
    for old in olds:
        kind = class_undivided(old)
        memo[id(old)] = kind.__new__(kind)
        for parameter in old._parameters.values():
            if parameter is not None and is_divided(parameter):
                hollow = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                memo[id(parameter)] = nn.Parameter(hollow, parameter.requires_grad)
    for old in olds:
        attributes = {key: without_division(value) for key, value in vars(old).items()}
        memo[id(old)].__dict__.update(copy.deepcopy(attributes, memo))
    new = memo[id(model)]
    for old in reversed(olds):  # parts before what they are parts of
        if is_fsdp_class(type(old)):
            _divide(memo[id(old)], old)
    with torch.no_grad():
        for (name, source), target in zip(model.named_parameters(), new.parameters(), strict=True):
            if is_divided(source):
                if _layout(target) != _layout(source):
                    raise TypeError(_refusal(name))
                local_part(target).copy_(local_part(source))
    return new


def _divide(new: nn.Module, old: Any) -> None:
    """Divide a module as another one is; its parts have been divided before."""
    from torch.distributed.fsdp import fully_shard

    state = old._get_fsdp_state()
    groups, policy = (getattr(state, name, None) for name in ("_fsdp_param_groups", "_mp_policy"))
    if groups is None or policy is None or len(groups) > 1 or len(getattr(state, "_modules", ())) != 1:
        raise TypeError(_refusal(type(old).__name__))
    sources: dict[int, Any] = {
        id(p): source for p, source in zip(new.parameters(), old.parameters(), strict=True)
    }
    made: dict[int, nn.Parameter] = {}
    places: dict[int, Any] = {}
    for module in new.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                source = sources[id(parameter)]
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=local_part(source).device)
                made[id(parameter)] = nn.Parameter(whole, parameter.requires_grad)
                *outer, places[id(made[id(parameter)])] = source.placements
                if not all(place.is_replicate() for place in outer):
                    raise TypeError(_refusal(name))
            module._parameters[name] = made[id(parameter)]
    mesh = next((p.device_mesh for p in old.parameters() if is_divided(p)), None)
    fully_shard(
        new,
        mesh=mesh,
        mp_policy=policy,
        shard_placement_fn=lambda p: places[id(p)],
        ignored_params={p for p in new.parameters() if not is_divided(p) and id(p) not in places},
        **({"offload_policy": groups[0].offload_policy} if groups else {}),
    )


def _layout(parameter: Any) -> tuple[Any, ...] | None:
    return (parameter.device_mesh, parameter.placements) if is_divided(parameter) else None


def _refusal(name: str) -> str:
    return (
        f"model: {name!r} is divided by fully_shard in a way of which no copy can be made; give model.state_dict(), which stays "
        "divided, and load the result with load_state_dict"
    )
