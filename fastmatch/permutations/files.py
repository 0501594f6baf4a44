"""Permutations in safetensors files, with their spec in the metadata."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fastmatch._internal.files import check_format, load_state, writing
from fastmatch.permutations.apply import check_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["load_permutations", "save_permutations"]


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
    with writing(path, force=force) as temporary:
        save_file(checked, temporary, metadata={"fastmatch.spec": spec.to_json()})


def load_permutations(path: str | Path) -> tuple[Permutations, PermutationSpec]:
    """Return what :func:`save_permutations` wrote.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    check_format(path, "path", {".safetensors"})
    permutations = load_state(path)
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("fastmatch.spec")
    if text is None:
        raise ValueError(f"{path}: holds no permutations (its metadata has no 'fastmatch.spec')")
    spec = PermutationSpec.from_json(text)
    return check_permutations(permutations, spec, str(path)), spec
