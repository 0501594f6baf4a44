"""Read and write files of tensors. Every file is written completely or not at all."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = [
    "STATE_SUFFIXES",
    "TORCH_SUFFIXES",
    "check_format",
    "check_target",
    "load_state",
    "save_state",
    "writing",
]

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin"})
STATE_SUFFIXES = TORCH_SUFFIXES | {".safetensors"}
"""The suffixes of the files that :func:`save_state` writes."""


def check_format(path: str | Path, argument: str, suffixes: Iterable[str]) -> None:
    """Raise ValueError unless the suffix of ``path`` is one of ``suffixes``: it decides the format of the file."""
    if Path(path).suffix not in set(suffixes):
        raise ValueError(f"{argument}: expected a file ending in {', '.join(sorted(suffixes))}, got {path}")


def check_target(path: str | Path, *, force: bool = False) -> None:
    """Raise FileExistsError if ``path`` exists and ``force`` is not set, FileNotFoundError if its folder does not exist."""
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(
            f"{path} exists; choose another path, or pass force=True (--force) to replace it"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; create it first")


@contextmanager
def writing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` and rename it to ``path`` on success.

    A run that fails or is killed leaves no partial file under ``path``.

    Raises:
        FileExistsError, FileNotFoundError: see :func:`check_target`.
    """
    path = Path(path)
    check_target(path, force=force)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)  # mkstemp creates private files; give this one the mode of any new file
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the state dict in a .safetensors file, or in a torch file with ``weights_only``.

    Args:
        path: the file.
        mmap: map a torch file into memory instead of reading it. Files of torch's old format are read anyway.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format, is truncated, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        mapped = mmap and zipfile.is_zipfile(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for a damaged or unsafe pickle
        raise ValueError(f"{path}: not a torch file that weights_only can read ({error})") from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ValueError(f"{path}: expected a state dict (name -> tensor)")
    return dict(data)


def save_state(state: Mapping[str, torch.Tensor], path: str | Path, *, force: bool = False) -> None:
    """Write a state dict: a safetensors file for .safetensors, a torch file for .pt, .pth and .bin.

    Raises:
        ValueError: the suffix is none of these.
        FileExistsError, FileNotFoundError: see :func:`check_target`.
    """
    check_format(path, "path", STATE_SUFFIXES)
    with writing(path, force=force) as temporary:
        if Path(path).suffix in TORCH_SUFFIXES:
            torch.save(dict(state), temporary)
        else:
            # safetensors refuses tensors that share memory, so tied tensors are written twice.
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, temporary)
