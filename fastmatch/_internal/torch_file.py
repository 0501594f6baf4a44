"""Torch files of state dicts: read with ``weights_only``, which runs no code, and written with the same bytes each time."""

from __future__ import annotations

import errno
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from fastmatch._internal.other_formats import TORCH, other_format
from fastmatch._internal.words import error_line

__all__ = ["check_archive", "load_torch", "save_torch", "torch_sink"]


def load_torch(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read the state dict in a torch file.

    Args:
        path: the file.
        mmap: map the file into memory instead of reading it. Files of torch's old format are read anyway.

    Raises:
        ValueError: the file is damaged, holds other objects than tensors, or a tensor larger than its data.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            check_archive(path, path.stat().st_size)
        data = _load(path, mmap=mmap and is_zip)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for a damaged or unsafe pickle
        data = _state_of_training(path, mmap=mmap) if isinstance(error, UnpicklingError) else None
        if data is None:
            reason = (
                f"not a torch file that weights_only can read ({other_format(path, TORCH) or _reason(error)})"
            )
            raise ValueError(f"{path}: {reason}") from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected a state dict (name -> tensor), got {type(data).__name__}")
    for name, value in data.items():
        _check_entry(path, name, value)
    return dict(data)


def _load(path: Path, *, mmap: bool) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read is an error
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


class _Inert:
    """Stands for any object of another package in a file of training. It runs nothing and keeps nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _state_of_training(path: Path, *, mmap: bool) -> dict[str, Any] | None:
    """Return the ``state_dict`` of a file that holds objects of other packages beside it, such as callbacks of lightning.

    Nothing of those packages is imported or called. None if the file is no such file.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            state = _load(path, mmap=mmap).get("state_dict")
    except Exception:  # the first error says why it cannot be read
        return None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None
    return dict(state) or None


def check_archive(file: Path | IO[bytes], size: int) -> None:
    """Refuse what torch never writes: an archive that is larger inside than outside.

    Raises:
        ValueError: its records hold more than ``size`` bytes.
    """
    with zipfile.ZipFile(file) as archive:
        inside = sum(info.file_size for info in archive.infolist())
    if inside > size:
        raise ValueError(f"its records hold {inside} bytes, the file {size}")


def _check_entry(path: Path, name: object, value: object) -> None:
    if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        raise ValueError(
            f"{path}: the state dict is its entry {name!r}; save that one alone: torch.save(data[{name!r}])"
        )
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{path}: expected a state dict (name -> tensor), but entry {name!r} is {type(value).__name__}; "
            "save the tensors alone"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise ValueError(f"{path}: tensor {name!r} is not a plain dense tensor")
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: tensor {name!r} of shape {tuple(value.shape)} has more entries than the file stores"
        )


def _reason(error: Exception) -> str:
    """Return one line. Torch's own text has many, and advises to load the file without ``weights_only``."""
    text = str(error).replace("\n", " ")
    if "weights_only" in text or "Unsupported" in text:
        kept = [part for part in text.split("WeightsUnpickler error: ")[1:] if part]
        named = (
            kept[0].split(". ")[0].split("  Check")[0].split(" was not an allowed")[0].strip()
            if kept
            else "other objects"
        )
        if named.startswith("Unsupported operand"):
            return f"it is damaged, or a pickle that torch.save has not written: {named}"
        return f"it is damaged or holds objects other than tensors: {named[:120]}; save model.state_dict() instead"
    return error_line(error)


class _Sink:
    """A file for torch.save that keeps its first error instead of raising it inside torch's C++ code."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or keep the error."""
        view = memoryview(data).cast("B")
        size = len(view)
        self.size += size
        try:
            while self.error is None and len(view):
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self.error = error
        return size

    def tell(self) -> int:
        """Return the number of bytes so far."""
        return self.size

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""

    def close(self) -> None:
        """Do nothing: who made the file closes it."""


@contextmanager
def torch_sink(path: Path, final: Path) -> Iterator[Any]:
    """Yield a file object for torch to write to: it would write the name of a path into the archive.

    Raises:
        OSError: a write failed, for example on a full disk. The message names ``final``, the name that the file will have.
    """
    with path.open("wb", buffering=0) as file:
        sink = _Sink(file.fileno())
        yield sink
    if sink.error is not None:
        number = sink.error.errno or errno.EIO
        raise OSError(number, f"could not be written ({os.strerror(number)}); nothing was kept", str(final))


def save_torch(state: Mapping[str, torch.Tensor], path: Path, final: Path) -> None:
    """Write a torch file; see :func:`torch_sink`. The same tensors give the same bytes, whatever the file is called."""
    with torch_sink(path, final) as sink:
        torch.save({name: tensor.detach() for name, tensor in state.items()}, sink)
