"""Applying, inverting and composing permutations. The convention is Git Re-Basin's: ``new_b[i] = b[perm[i]]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastmatch._internal.states import State
from fastmatch.spec import Axis, Permutations, PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = [
    "apply_permutations", "check_permutations", "compose", "dimension_indices", "invert", "is_identity",
    "moved_positions", "permute_tensor", "slice_indices",
]  # fmt: skip

LARGE = 1 << 20
"""Elements above which reading a tensor once pays for the kernel's call; torch's second pass over fewer is in cache."""


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
    """Per dimension that moves, the index to select by: all groups on it combined, without ``skip``.

    Units that lie only in a slice of the parameter are left out: see :func:`slice_indices`. Not to be written
    to: it may be the permutation itself.
    """
    indices: dict[int, torch.Tensor] = {}
    for axis, name in spec.axes_of(parameter):
        if axis == skip or axis.at:
            continue
        size = spec.groups[name].size
        perm = permutations[name]
        if is_identity(perm):
            continue
        length = spec.shapes[parameter][axis.dim]
        index = indices.get(axis.dim)
        if axis.is_whole(size, length):
            indices[axis.dim] = perm if index is None else index[perm]
            continue
        indices[axis.dim] = index = torch.arange(length) if index is None else index.clone()
        positions = axis.positions(size)
        # Read through `index`, since another group may already have moved whole blocks of this dimension.
        index[positions] = index[positions[:, perm, :]]
    return indices


def slice_indices(
    parameter: str, spec: PermutationSpec, permutations: Permutations, skip: Axis | None = None
) -> list[tuple[Axis, torch.Tensor]]:
    """(axis, index along its dimension) for every group that moves in a slice of the parameter only."""
    found = []
    for axis, name in spec.axes_of(parameter):
        if axis.at and axis != skip and not is_identity(permutations[name]):
            index = torch.arange(spec.shapes[parameter][axis.dim])
            positions = axis.positions(spec.groups[name].size)
            index[positions] = positions[:, permutations[name], :]
            found.append((axis, index))
    return found


def is_identity(permutation: torch.Tensor) -> bool:
    """Whether a permutation moves nothing."""
    return torch.equal(permutation, torch.arange(len(permutation)))


def moved_positions(
    now: Mapping[int, torch.Tensor], then: Mapping[int, torch.Tensor], shape: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Per dimension the positions at which two selections of :func:`dimension_indices` differ; none where they do not."""
    moved: dict[int, torch.Tensor] = {}
    for dim in now.keys() | then.keys():
        after, before = now.get(dim), then.get(dim)
        if after is before:
            continue
        every = torch.arange(shape[dim]) if after is None or before is None else after
        positions = torch.nonzero(
            (every if after is None else after) != (every if before is None else before)
        )
        if len(positions):
            moved[dim] = positions.flatten()
    return moved


def permute_tensor(
    tensor: torch.Tensor,
    parameter: str,
    spec: PermutationSpec,
    permutations: Permutations,
    skip: Axis | None = None,
) -> torch.Tensor:
    """``tensor`` with every group's axes moved but ``skip``; the same object when nothing moves."""
    given = tensor
    for dim, index in dimension_indices(parameter, spec, permutations, skip).items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    slices = slice_indices(parameter, spec, permutations, skip)
    return _reorder_slices(tensor.clone() if tensor is given else tensor, slices) if slices else tensor


def _reorder_slices(tensor: torch.Tensor, slices: Sequence[tuple[Axis, torch.Tensor]]) -> torch.Tensor:
    """``tensor``, with every slice reordered in place; what moves whole slices has moved before."""
    for axis, index in slices:
        part = axis.slice_of(tensor)
        part.copy_(part.index_select(axis.dim, index.to(tensor.device)))
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
        moved = _reordered(tensor, indices) if indices else tensor.clone()
        result[name] = _reorder_slices(moved, slice_indices(name, spec, checked))
    return result


def _reordered(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    """``tensor`` selected by every index, read and written once where there is a kernel for that.

    Along one dimension torch does so itself.
    """
    is_large = tensor.numel() >= LARGE and tensor.itemsize >= 2
    if is_large and tensor.is_floating_point() and tensor.device.type == "cpu" and len(indices) == 2:
        from fastmatch_kernels import ops as kernels

        (first, rows), (second, columns) = sorted(indices.items())
        return kernels.permute_merge([tensor], [1.0], [rows], [columns], dims=(first, second))
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def invert(permutations: Permutations, spec: PermutationSpec | None = None) -> Permutations:
    """The permutations that undo ``permutations``; ``spec`` is needed where groups lie within others."""
    result = {name: torch.argsort(perm) for name, perm in permutations.items()}
    for (outer, _), family in _families(spec).items():
        if outer in permutations:
            # Block i of the inverse lies where B's block now is: position inverse[i] of the result.
            for group, source in zip(family, result[outer].tolist(), strict=True):
                if family[source] in permutations:
                    result[group] = torch.argsort(permutations[family[source]])
    return result


def compose(first: Permutations, second: Permutations, spec: PermutationSpec | None = None) -> Permutations:
    """One step equal to applying ``first`` and then ``second``; both must name the same groups.

    ``spec`` is needed where groups lie within others.
    """
    if first.keys() != second.keys():
        raise ValueError(f"second: expected the groups {sorted(first)}, got {sorted(second)}")
    result = {name: perm[second[name]] for name, perm in first.items()}
    for (outer, _), family in _families(spec).items():
        if outer in second:
            for group, source in zip(family, second[outer].tolist(), strict=True):
                if family[source] in first:
                    result[group] = first[family[source]][second[group]]
    return result


def _families(spec: PermutationSpec | None) -> dict[tuple[str, int], tuple[str, ...]]:
    return {} if spec is None else spec.subgroups()
