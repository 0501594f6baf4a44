"""Read checkpoints lazily: a mapping of names to tensors that keeps no tensor in memory.

Safetensors files are read with plain file reads, not with a memory map. Mapped pages count as this process's memory
until the system drops them, whereas a buffer is freed together with its tensor.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastmatch._internal.files import TORCH_SUFFIXES, load_state

__all__ = ["CONFIG", "DTYPES", "INDEX", "Checkpoint", "Entry"]

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
HEADER_LIMIT = 100_000_000
"""Maximum header size in bytes, the format's own limit. It keeps a damaged length from allocating all memory."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' name of an element type -> torch's type."""


@dataclass(frozen=True)
class Entry:
    """The place of one tensor: its file, element type, shape, and byte range from ``begin`` to ``end`` in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face directory, a .safetensors file or a torch file. Each is read on demand.

    Example:
        >>> from fastmatch.checkpoint import Checkpoint
        >>> checkpoint = Checkpoint("model-a")
        >>> checkpoint.headers["lm_head.weight"].shape  # reads no tensor
        torch.Size([32, 16])

    Args:
        path: a directory with model.safetensors or with shards and their index, or a single file. Torch files are
            memory-mapped and read with ``weights_only``.
        device: the device that tensors are moved to.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or has another format. The message names the file and, if there is one, the tensor.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self.seconds = 0.0
        """Seconds spent reading tensors so far."""
        self._loaded: dict[str, torch.Tensor] = {}
        self._entries: dict[str, Entry] = {}
        if self.path.is_dir():
            self.files = self._read_directory()
        elif not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        else:
            self.files = [self.path]
            if self.path.suffix in TORCH_SUFFIXES:
                self._loaded = load_state(self.path, mmap=True)
            else:
                self._entries = read_header(self.path)

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Name -> tensor on the meta device, which has a shape and type but no values."""
        known = {k: (v.shape, v.dtype) for k, v in self._loaded.items()}
        known |= {k: (torch.Size(v.shape), v.dtype) for k, v in self._entries.items()}
        return {k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in known.items()}

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.headers.values())

    def names_in(self, file: Path) -> list[str]:
        """Return the names of the tensors in one of :attr:`files`, in the file's order."""
        if self._loaded:
            return list(self._loaded)
        names = [k for k, v in self._entries.items() if v.file == file]
        return sorted(names, key=lambda k: self._entries[k].begin)

    def __getitem__(self, name: str) -> torch.Tensor:
        started = time.perf_counter()
        tensor = (self._loaded[name] if self._loaded else self._read(name)).to(self.device)
        self.seconds += time.perf_counter() - started
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded or self._entries)

    def __len__(self) -> int:
        return len(self._loaded or self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in self._entries

    def _read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
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

    def _read_directory(self) -> list[Path]:
        index = self.path / INDEX
        if not index.is_file():
            single = self.path / SINGLE
            if not single.is_file():
                raise FileNotFoundError(f"{self.path}: holds neither {SINGLE} nor {INDEX}")
            self._entries = read_header(single)
            return [single]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a 'weight_map' of tensor names to files")
        shards: dict[str, dict[str, Entry]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(
                    f"{index}: tensor {name!r} is mapped to {shard!r}, which is not a plain file name"
                )
            if shard not in shards:
                if not (self.path / shard).is_file():
                    raise FileNotFoundError(
                        f"{index}: names {shard} for tensor {name!r}, but there is no such file"
                    )
                shards[shard] = read_header(self.path / shard)
            if name not in shards[shard]:
                raise ValueError(f"{self.path / shard}: holds no tensor {name!r}, although the index says so")
        for shard, entries in shards.items():
            for name in entries:
                if weight_map.get(name) != shard:
                    raise ValueError(
                        f"{self.path / shard}: holds tensor {name!r}, which the index does not name"
                    )
            self._entries.update(entries)
        return [self.path / shard for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raise ValueError naming the file if it holds anything else."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are both
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file and check it against the file's length. No tensor is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{path}: not a readable safetensors file (damaged or truncated header)")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, raw, 8 + length) for name, raw in header.items()}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file (header: {error!r})") from error
    for name, entry in entries.items():
        if entry.end > size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {entry.end}, the file at {size}"
            )
    return entries


def _entry(path: Path, name: str, raw: dict[str, Any], start: int) -> Entry:
    dtype = DTYPES.get(raw["dtype"])
    if dtype is None:
        raise ValueError(f"{path}: tensor {name!r} has element type {raw['dtype']!r}, which is not supported")
    shape = tuple(int(n) for n in raw["shape"])
    begin, end = (start + int(n) for n in raw["data_offsets"])
    if min(shape, default=0) < 0 or begin < start or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} does not fill its {end - begin} bytes")
    return Entry(path, dtype, shape, begin, end)
