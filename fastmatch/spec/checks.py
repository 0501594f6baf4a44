"""Checks of a spec against the tensors it is applied to."""

from __future__ import annotations

from fastmatch._internal.states import State
from fastmatch.spec.spec import PermutationSpec

__all__ = ["check_spec"]


def check_spec(spec: PermutationSpec, state: State, argument: str) -> None:
    """ValueError when a tensor that a group moves is absent or of another shape than the spec's."""
    for group in spec.groups.values():
        for axis in group.axes:
            tensor = state.get(axis.parameter)
            if tensor is None:
                raise ValueError(
                    f"{argument}: has no tensor {axis.parameter!r}, which the spec's group {group.name!r} moves"
                )
            if tuple(tensor.shape) != spec.shapes[axis.parameter]:
                raise ValueError(
                    f"{argument}: tensor {axis.parameter!r} has shape {tuple(tensor.shape)}, "
                    f"the spec expects {spec.shapes[axis.parameter]}"
                )
