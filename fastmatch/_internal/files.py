"""Files, written whole or not at all: state dicts and permutations."""

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

__all__ = ["TORCH_SUFFIXES", "check_format", "check_target", "load_state", "save_state", "writing"]


TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin"})


def check_format(path: str | Path, argument: str, suffixes: Iterable[str]) -> None:
    """ValueError when a file's suffix says nothing of how to write it, or is not among ``suffixes``."""
    if Path(path).suffix not in set(suffixes):
        raise ValueError(f"{argument}: expected a file ending in {', '.join(sorted(suffixes))}, got {path}")


def check_target(path: str | Path, *, force: bool = False) -> None:
    """FileExistsError when ``path`` exists and ``force`` is not set, FileNotFoundError when its folder does not."""
    path = Path(path)
    if path.exists() and not force:
        raise FileExistsError(
            f"{path} exists; choose another path, or pass force=True (--force) to replace it"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; make it first")


@contextmanager
def writing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` and renames it on success; a killed run leaves no half file.

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
        umask = os.umask(0)  # mkstemp makes private files; give this one the mode any new file gets
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: str | Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in a torch file read with ``weights_only``.

    Args:
        path: the file.
        mmap: map a torch file into memory instead of reading it; files of torch's old format are read.

    Raises:
        ValueError: the file is not of these formats, is truncated, or holds no state dict.
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
    except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
        raise ValueError(f"{path}: not a torch file that weights_only can read ({error})") from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ValueError(f"{path}: expected a state dict (name -> tensor)")
    return dict(data)


def save_state(state: Mapping[str, torch.Tensor], path: str | Path, *, force: bool = False) -> None:
    """Writes a state dict as .safetensors, or as a torch file for .pt, .pth and .bin; no other suffix."""
    check_format(path, "path", TORCH_SUFFIXES | {".safetensors"})
    with writing(path, force=force) as temporary:
        if Path(path).suffix in TORCH_SUFFIXES:
            torch.save(dict(state), temporary)
        else:
            # safetensors refuses tensors that share memory; tied ones are written out twice.
            save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, temporary)
