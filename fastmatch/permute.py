"""Applying, inverting and composing permutations. The convention is Git Re-Basin's: ``new_b[i] = b[perm[i]]``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastmatch.spec import Axis, Permutations, PermutationSpec
from fastmatch.states import State, check_spec

__all__ = ["apply_permutations", "check_permutations", "compose", "invert", "permute_tensor"]

LARGE = 1 << 16
"""Elements above which reading a tensor once pays for the kernel's call."""


def check_permutations(
    permutations: Mapping[str, torch.Tensor], spec: PermutationSpec, argument: str = "permutations"
) -> Permutations:
    """The permutations as LongTensors on the CPU, one per group; groups not named stay as they are.

    Raises:
        ValueError: an unknown group, a wrong length, or entries that are not a permutation.
    """
    unknown = [name for name in permutations if name not in spec.groups]
    if unknown:
        raise ValueError(f"{argument}: unknown group {unknown[0]!r}; the spec has {list(spec.groups)}")
    checked = spec.identity()
    for name, perm in permutations.items():
        size = spec.groups[name].size
        perm = torch.as_tensor(perm).detach().cpu()
        if perm.shape != (size,) or perm.is_floating_point() or perm.dtype == torch.bool:
            raise ValueError(
                f"{argument}[{name!r}]: expected {size} integers, got shape {tuple(perm.shape)} of {perm.dtype}"
            )
        perm = perm.long()
        if not torch.equal(perm.sort().values, checked[name]):
            raise ValueError(f"{argument}[{name!r}]: not a permutation of 0..{size - 1}")
        checked[name] = perm
    return checked


def dimension_indices(
    parameter: str, spec: PermutationSpec, permutations: Permutations, skip: Axis | None = None
) -> dict[int, torch.Tensor]:
    """Per dimension that moves, the index to select by: all groups on it combined, without ``skip``."""
    indices: dict[int, torch.Tensor] = {}
    for axis, name in spec.axes_of(parameter):
        if axis == skip:
            continue
        size = spec.groups[name].size
        perm = permutations[name]
        if torch.equal(perm, torch.arange(size)):
            continue
        length = spec.shapes[parameter][axis.dim]
        if axis.dim not in indices:
            indices[axis.dim] = torch.arange(length)
        index = indices[axis.dim]
        if axis.is_whole(size, length):
            indices[axis.dim] = index[perm]
            continue
        positions = axis.positions(size)
        # Read through `index`, since another group may already have moved whole blocks of this dimension.
        index[positions] = index[positions[:, perm, :]]
    return indices


def permute_tensor(
    tensor: torch.Tensor,
    parameter: str,
    spec: PermutationSpec,
    permutations: Permutations,
    skip: Axis | None = None,
) -> torch.Tensor:
    """``tensor`` with every group's axes moved but ``skip``; the same object when nothing moves."""
    for dim, index in dimension_indices(parameter, spec, permutations, skip).items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def apply_permutations(
    state: State, spec: PermutationSpec, permutations: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A new state dict with every group's units reordered; no tensor of ``state`` is changed or shared.

    Args:
        state: name -> tensor, any dtype and device.
        spec: which axes move together.
        permutations: group name -> permutation of shape (size,); groups left out stay.

    Raises:
        ValueError: a tensor the spec moves is missing or of another shape, or a permutation is not one.

    Cost: one read and one write of each tensor and moving dimension.
    """
    check_spec(spec, state, "state")
    checked = check_permutations(permutations, spec)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        indices = dimension_indices(name, spec, checked)
        result[name] = _reordered(tensor, indices) if indices else tensor.clone()
    return result


def _reordered(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    """``tensor`` selected by every index, read and written once where there is a kernel for that."""
    is_large = tensor.numel() >= LARGE and tensor.itemsize >= 2
    if is_large and tensor.is_floating_point() and tensor.device.type == "cpu" and len(indices) <= 2:
        from fastmatch.kernels import dispatch

        dims = sorted(indices)
        first, *second = (indices[dim] for dim in dims)
        pair = (dims[0], dims[-1]) if second else (dims[0], dims[0] + 1)
        return dispatch.permute_merge([tensor], [1.0], [first], second or None, dims=pair)
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def invert(permutations: Permutations) -> Permutations:
    """The permutations that undo ``permutations``."""
    return {name: torch.argsort(perm) for name, perm in permutations.items()}


def compose(first: Permutations, second: Permutations) -> Permutations:
    """One step equal to applying ``first`` and then ``second``; both must name the same groups."""
    if first.keys() != second.keys():
        raise ValueError(f"second: expected the groups {sorted(first)}, got {sorted(second)}")
    return {name: perm[second[name]] for name, perm in first.items()}
