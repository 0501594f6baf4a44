"""Read and write files of tensors. Every file is written completely or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from fastmatch._internal.allowed import STATE_SUFFIXES, TORCH_SUFFIXES
from fastmatch._internal.checks import check_format
from fastmatch._internal.outputs import check_target, writing
from fastmatch._internal.safetensors_file import read_entry, read_header, write_safetensors
from fastmatch._internal.torch_file import load_torch, save_torch

__all__ = [
    "STATE_SUFFIXES",
    "TORCH_SUFFIXES",
    "check_format",
    "check_target",
    "in_common",
    "load_state",
    "save_state",
    "shared_metadata",
    "writing",
]

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Entries of a header that are hashes of the file's tensors, by which programs know a model."""


def load_state(path: str | Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the state dict in a .safetensors file, or in a torch file with ``weights_only``.

    Args:
        path: the file.
        mmap: map a torch file into memory instead of reading it. Files of torch's old format are read anyway.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder; the error says what to give.
        ValueError: the file has another format, is damaged, or holds no state dict. File and tensor are named.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; expected a file of tensors{_file_in(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return {name: read_entry(name, entry) for name, entry in read_header(path)[0].items()}
    return load_torch(path, mmap=mmap)


def _file_in(folder: Path) -> str:
    """Return what to do about a folder in the place of a file."""
    held = sorted(p for p in folder.iterdir() if p.suffix in STATE_SUFFIXES and p.is_file())
    kinds = [p for p in held if p.suffix == ".safetensors"] or held
    if len(kinds) == 1:
        return f"; give {kinds[0]}"
    if kinds:
        return (
            f", and its tensors are in {len(kinds)} files; load the network in Python, as with from_pretrained, and write its state_dict() to one "
            "file (torch.save)"
        )
    return ", and it holds none"


def save_state(
    state: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict: a safetensors file for .safetensors, a torch file for .ckpt, .pt, .pth and .bin.

    The bytes of the file depend on the tensors and the metadata alone.

    Args:
        state: the tensors. In a safetensors file, tied tensors are written twice.
        path: the file.
        force: replace an existing file.
        metadata: for the header of a safetensors file; torch files have none.

    Raises:
        ValueError: the suffix is none of these, or the format has no such element type.
        OSError: the file exists (without ``force``) or cannot be written.
    """
    path = Path(path)
    check_format(path, "path", STATE_SUFFIXES)
    with writing(path, force=force) as temporary:
        if path.suffix in TORCH_SUFFIXES:
            save_torch(state, temporary, path)
        else:
            # As the library orders them: large elements first, so that every tensor is aligned in the file.
            order = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
            write_safetensors(
                temporary, path, {k: state[k] for k in order}, state.__getitem__, metadata or {}
            )


def shared_metadata(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the entries that the headers of all files have in common; torch files have none.

    What is written from several files is described by what is true of each.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_state`.
    """
    return in_common([read_header(Path(p))[1] if Path(p).suffix == ".safetensors" else {} for p in paths])


def in_common(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the entries that all headers have, but for hashes of the tensors, which are others now."""
    first, *others = headers or [{}]
    return {k: v for k, v in first.items() if k not in HASHES and all(h.get(k) == v for h in others)}
