"""Permutations in safetensors files, with their spec in the metadata."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmatch._internal.files import check_format, load_state, save_state, shared_metadata
from fastmatch.permutations.apply import check_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["load_permutations", "save_permutations"]

SPEC = "fastmatch.spec"
"""The entry of the metadata that holds the spec."""


def save_permutations(
    permutations: Permutations, spec: PermutationSpec, path: str | Path, *, force: bool = False
) -> None:
    """Write permutations as safetensors, with the spec as text in the metadata; nothing is pickled.

    Raises:
        ValueError: ``path`` has another suffix, or a permutation does not fit the spec.
        OSError: the file exists (without ``force``) or cannot be written.
    """
    check_format(path, "path", {".safetensors"})
    checked = check_permutations(permutations, spec)
    save_state(checked, path, force=force, metadata={SPEC: spec.to_json()})


def load_permutations(path: str | Path) -> tuple[Permutations, PermutationSpec]:
    """Return what :func:`save_permutations` wrote.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    check_format(path, "path", {".safetensors"})
    permutations = load_state(path)
    text = shared_metadata([path]).get(SPEC)
    if text is None:
        raise ValueError(f"{path}: holds no permutations (its metadata has no {SPEC!r})")
    try:
        spec = PermutationSpec.from_json(text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: its spec cannot be read ({error})") from error
    _check_sizes(permutations, spec, path)
    return check_permutations(permutations, spec, str(path)), spec


def _check_sizes(permutations: dict[str, torch.Tensor], spec: PermutationSpec, path: str | Path) -> None:
    """Compare the sizes in the spec, which cost nothing to write, with the tensors before anything is made of them."""
    for name, group in spec.groups.items():
        if name not in permutations:
            raise ValueError(f"{path}: holds no permutation of group {name!r}, which its spec has")
        if permutations[name].shape != (group.size,):
            shape = tuple(permutations[name].shape)
            raise ValueError(f"{path}: tensor {name!r} has shape {shape}, its spec says ({group.size},)")
