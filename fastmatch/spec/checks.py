"""Checks of a spec against the tensors it is applied to."""

from __future__ import annotations

from fastmatch._internal.states import State, prefix_of, under_prefix
from fastmatch.spec.spec import PermutationSpec

__all__ = ["check_spec"]


def check_spec(spec: PermutationSpec, state: State, argument: str) -> None:
    """Raise ValueError if a tensor that a group moves is missing or has another shape than in the spec, TypeError without one."""
    if not isinstance(getattr(spec, "groups", None), dict):
        raise TypeError(
            f"spec: expected a PermutationSpec (PermutationSpec.trace(model, x)), got {type(spec).__name__}"
        )
    for group in spec.groups.values():
        for axis in group.axes:
            tensor = state.get(axis.parameter)
            if tensor is None:
                prefix = prefix_of(spec.shapes, state)
                if prefix:
                    raise ValueError(f"{argument}: {under_prefix(prefix, state, argument)}")
                raise ValueError(
                    f"{argument}: has no tensor {axis.parameter!r}, which the spec's group {group.name!r} moves"
                )
            if tuple(tensor.shape) != spec.shapes[axis.parameter]:
                raise ValueError(
                    f"{argument}: tensor {axis.parameter!r} has shape {tuple(tensor.shape)}, "
                    f"the spec expects {spec.shapes[axis.parameter]}"
                )
