"""Apply, invert and compose permutations. The convention is Git Re-Basin's: ``new_b[i] = b[perm[i]]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from fastmatch._internal.divided import on_whole
from fastmatch._internal.states import State
from fastmatch.spec import Axis, Permutations, PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = [
    "apply_permutations", "check_permutations", "compose", "dimension_indices", "invert", "is_identity",
    "permute_tensor", "slice_indices",
]  # fmt: skip

LARGE = 1 << 20
"""Elements above which the kernel, which reads a tensor once, is faster than torch. Smaller tensors stay in cache between
torch's two passes."""


def check_permutations(
    permutations: Mapping[str, torch.Tensor], spec: PermutationSpec, argument: str = "permutations"
) -> Permutations:
    """Return the permutations as LongTensors on the CPU, one per group; groups that are not named stay in place.

    Raises:
        ValueError: a group is not in the spec, or has a wrong length or entries that are not a permutation.
    """
    unknown = [name for name in permutations if name not in spec.groups]
    if unknown:
        raise ValueError(f"{argument}: unknown group {unknown[0]!r}; the spec has {list(spec.groups)}")
    checked = spec.identity()
    for name, perm in permutations.items():
        size = spec.groups[name].size
        perm = torch.as_tensor(perm, device="cpu").detach().cpu()
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
    """Return dimension -> the index to select by, for each dimension that moves; all groups but ``skip`` combined.

    Groups that occupy only a slice of the parameter are omitted: see :func:`slice_indices`. The result must not be
    written to, because it may be the permutation itself.
    """
    indices: dict[int, torch.Tensor] = {}
    shared: set[int] = set()  # dimensions whose index is the permutation itself
    for axis, name in spec.axes_of(parameter):
        if axis == skip or axis.at:
            continue
        size = spec.groups[name].size
        perm = permutations[name]
        if is_identity(perm):
            continue
        dim, length = axis.dim, spec.shapes[parameter][axis.dim]
        index = indices.get(dim)
        if axis.is_whole(size, length):
            indices[dim] = perm if index is None else index[perm]
            (shared.add if index is None else shared.discard)(dim)
            continue
        if index is None or dim in shared:
            index = torch.arange(length, device="cpu") if index is None else index.clone()
            indices[dim] = index
            shared.discard(dim)
        # Read through `index`, since another group may already have moved whole blocks of this dimension.
        units = _units(index, axis, size)
        units.copy_(units[:, perm])
    return indices


def _units(index: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """Return a view (outer, size, inner) of what an index along an axis has at the positions of the units."""
    return index.as_strided((axis.outer, size, axis.inner), (axis.stride, axis.inner, 1), axis.start)


def slice_indices(
    parameter: str, spec: PermutationSpec, permutations: Permutations, skip: Axis | None = None
) -> list[tuple[Axis, torch.Tensor]]:
    """Return (axis, index along its dimension) for each group that moves only in a slice of the parameter."""
    found = []
    for axis, name in spec.axes_of(parameter):
        if axis.at and axis != skip and not is_identity(permutations[name]):
            index = torch.arange(spec.shapes[parameter][axis.dim], device="cpu")
            units = _units(index, axis, spec.groups[name].size)
            units.copy_(units[:, permutations[name]])
            found.append((axis, index))
    return found


def is_identity(permutation: torch.Tensor) -> bool:
    """Return whether a permutation moves nothing."""
    return torch.equal(permutation, torch.arange(len(permutation), device="cpu"))


def permute_tensor(
    tensor: torch.Tensor,
    parameter: str,
    spec: PermutationSpec,
    permutations: Permutations,
    skip: Axis | None = None,
) -> torch.Tensor:
    """Return ``tensor`` with the axes of all groups but ``skip`` moved; the same object if nothing moves."""
    indices = dimension_indices(parameter, spec, permutations, skip)
    slices = slice_indices(parameter, spec, permutations, skip)
    return _moved(tensor, indices, slices) if indices or slices else tensor


def _reorder_slices(tensor: torch.Tensor, slices: Sequence[tuple[Axis, torch.Tensor]]) -> torch.Tensor:
    """Reorder every slice in place and return ``tensor``; groups that move whole slices must have moved already."""
    for axis, index in slices:
        part = axis.slice_of(tensor)
        part.copy_(part.index_select(axis.dim, index.to(tensor.device)))
    return tensor


@torch.inference_mode(False)
def apply_permutations(
    state: State, spec: PermutationSpec, permutations: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a new state dict with the units of every group reordered; no tensor of ``state`` is changed or shared.

    Args:
        state: name -> tensor, any dtype and device. DTensors are gathered one by one, by all ranks, and divided as before.
        spec: which axes move together.
        permutations: group name -> permutation of shape (size,); groups that are omitted stay in place.

    Raises:
        ValueError: a tensor that the spec moves is missing or has another shape, or a permutation is not one.

    Cost: one read and one write of each tensor per dimension that moves.
    """
    check_spec(spec, state, "state")
    checked = check_permutations(permutations, spec)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        indices = dimension_indices(name, spec, checked)
        slices = slice_indices(name, spec, checked)
        if indices or slices:
            result[name] = on_whole(tensor, partial(_moved, indices=indices, slices=slices))
        else:
            result[name] = tensor.clone()
    return result


def _moved(
    tensor: torch.Tensor, indices: dict[int, torch.Tensor], slices: Sequence[tuple[Axis, torch.Tensor]]
) -> torch.Tensor:
    """A new tensor, selected by every index, with every slice reordered."""
    return _reorder_slices(_reordered(tensor, indices) if indices else tensor.clone(), slices)


def _reordered(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    """``tensor`` selected by every index; the kernel reads and writes it once for two dimensions."""
    if _has_kernel(tensor, indices):
        from fastmatch_kernels import ops as kernels

        first, second = sorted(indices) if len(indices) == 2 else (0, *indices)
        rows, columns = indices.get(first), indices[second]
        return kernels.permute_merge([tensor], [1.0], [rows], [columns], dims=(first, second))
    for dim, index in indices.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _has_kernel(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> bool:
    """Whether the kernel is faster than torch, which copies the tensor once for each dimension, and on a CPU gathers within rows one by one."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.requires_grad or len(indices) > 2:
        return False
    if tensor.device.type == "cuda":
        return len(indices) == 2 and tensor.itemsize <= 4
    return tensor.device.type == "cpu" and tensor.numel() >= LARGE and indices.keys() != {0}


def invert(permutations: Permutations, spec: PermutationSpec | None = None) -> Permutations:
    """Return the permutations that undo ``permutations``; ``spec`` is needed if groups have subgroups."""
    result = {name: torch.argsort(perm) for name, perm in permutations.items()}
    for (outer, _), names in _subgroups(spec).items():
        if outer in permutations:
            # Block i of the inverse comes from position inverse[i].
            for group, source in zip(names, result[outer].tolist(), strict=True):
                if names[source] in permutations:
                    result[group] = torch.argsort(permutations[names[source]])
    return result


def compose(first: Permutations, second: Permutations, spec: PermutationSpec | None = None) -> Permutations:
    """Return one step equal to applying ``first`` and then ``second``; both must name the same groups.

    ``spec`` is needed if groups have subgroups.
    """
    if first.keys() != second.keys():
        raise ValueError(f"second: expected the groups {sorted(first)}, got {sorted(second)}")
    result = {name: perm[second[name]] for name, perm in first.items()}
    for (outer, _), names in _subgroups(spec).items():
        if outer in second:
            for group, source in zip(names, second[outer].tolist(), strict=True):
                if names[source] in first:
                    result[group] = first[names[source]][second[group]]
    return result


def _subgroups(spec: PermutationSpec | None) -> dict[tuple[str, int], tuple[str, ...]]:
    return {} if spec is None else spec.subgroups()
