"""The safetensors format: headers read and judged, files read and written tensor by tensor.

The library of that name judges every file. What it lacks is read and written here: the places of the tensors, so that
each is read into a buffer of its own instead of a memory map, and files whose bytes depend on their content alone (the
library writes metadata in a random order).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastmatch._internal.concurrent import ahead
from fastmatch._internal.json_files import parse_json
from fastmatch._internal.other_formats import SAFETENSORS, other_format

__all__ = ["DTYPES", "Entry", "read_entry", "read_header", "write_safetensors"]

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _TORCH_NAMES.items() if hasattr(torch, attribute)
}
"""safetensors' name of an element type -> torch's type. The others have less than a byte an element."""

HUGE = 1 << 22
"""Bytes from which a tensor is read into huge pages, which have 2 MB each."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The place of one tensor: its file, element type, shape, and byte range from ``begin`` to ``end`` in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the places of a file's tensors, and its metadata. No tensor is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the safetensors library refuses the file, a name is there twice, or torch has no such element type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), dict(file.metadata() or {})
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        reason = other_format(path, SAFETENSORS) or f"{_faulty_tensor(path)}{_reason(error)}"
        raise ValueError(f"{path}: not a readable safetensors file ({reason})") from error
    header.pop("__metadata__", None)
    if header.keys() != names:
        raise ValueError(f"{path}: not a readable safetensors file (its names are read in two ways)")
    return {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}, metadata


def _reason(error: Exception) -> str:
    return str(error).replace("\n", " ")


def _faulty_tensor(path: Path) -> str:
    """Return which tensor of a refused file is at fault, as far as its header can be read; the library does not say."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            header = parse_json(file.read(max(0, min(length, size + length))))
        header.pop("__metadata__", None)
        end = 0
        for name, raw in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = raw["data_offsets"]
            if begin != end:
                return f"tensor {name!r} begins at byte {begin}, the one before ends at {end}: "
            if stop > size:
                return f"truncated: tensor {name!r} ends at byte {stop}, the file at {size}: "
            if (
                raw["dtype"] not in DTYPES
                or stop - begin != math.prod(raw["shape"]) * DTYPES[raw["dtype"]].itemsize
            ):
                return f"tensor {name!r} of type {raw['dtype']} and shape {raw['shape']} in {stop - begin} bytes: "
            end = stop
        return f"{size - end} bytes after the last tensor: " if size > end else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return ""


def _entry(path: Path, name: str, raw: Mapping[str, Any], start: int) -> Entry:
    dtype = DTYPES.get(raw["dtype"])
    if dtype is None:
        raise ValueError(f"{path}: tensor {name!r} has element type {raw['dtype']!r}, which is not supported")
    try:
        torch.empty(raw["shape"], dtype=dtype, device="meta")
    except (RuntimeError, TypeError) as error:  # no entries, but a size that overflows
        raise ValueError(
            f"{path}: tensor {name!r} of shape {raw['shape']} is impossible ({_reason(error)})"
        ) from error
    begin, end = raw["data_offsets"]
    return Entry(path, dtype, tuple(raw["shape"]), start + begin, start + end)


def read_entry(name: str, entry: Entry) -> torch.Tensor:
    """Read one tensor into memory.

    Raises:
        ValueError: the file cannot be read, or ends too early because it has changed since.
    """
    tensor = _empty(entry)
    if not tensor.numel():
        return tensor
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise OSError(f"the file ends after {done} of {len(buffer)} bytes")
                done += count
    except OSError as error:
        raise ValueError(f"{entry.file}: tensor {name!r} cannot be read ({error})") from error
    return tensor


def _empty(entry: Entry) -> torch.Tensor:
    """Return a tensor to read into. A large one is in huge pages where the system has them: a fault for every 4 KB takes longer than
    the copy from the system's cache."""
    size, advice = entry.end - entry.begin, getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < max(HUGE, 1):
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=entry.dtype).view(entry.shape)


def write_safetensors(
    path: Path,
    final: Path,
    headers: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whose bytes depend on its content alone. The header comes first, so tensors are made one by one; the next is made, in a
    thread, while one is written.

    Args:
        path: the file to write.
        final: the name that it will have, for errors.
        headers: name -> a tensor of the shape and type to write, in the order to write them in.
        read: name -> the tensor.
        metadata: what the header says besides.

    Raises:
        OSError: a write failed, for example on a full disk. The message names the tensor.
        ValueError: the format has no such element type, or a tensor has another shape or type than its header.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, like in headers.items():
        if like.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{final}: tensor {name!r} has element type {like.dtype}, which safetensors files do not have"
            )
        begin, end = end, end + like.numel() * like.dtype.itemsize
        table[name] = {
            "dtype": DTYPE_NAMES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:

        def write(what: str, data: memoryview) -> None:
            try:
                while len(data):
                    data = data[os.write(file.fileno(), data) :]
            except OSError as error:
                message = f"{what} could not be written ({error.strerror}); nothing was kept"
                raise OSError(error.errno, message, str(final)) from error

        write("header", memoryview(len(text).to_bytes(8, "little") + text))
        # Errors of reading are those of another tensor and of another file: they are left as they are.
        for (name, like), tensor in zip(headers.items(), ahead(read, headers), strict=True):
            write(f"tensor {name!r}", _bytes_of(name, tensor, like))


def _bytes_of(name: str, tensor: torch.Tensor, like: torch.Tensor) -> memoryview:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"tensor {name!r}: expected shape {tuple(like.shape)} and type {like.dtype}, which the header of the file says; "
            f"got {tuple(tensor.shape)} and {tensor.dtype}"
        )
    # NumPy has no view of an empty tensor of every type.
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
