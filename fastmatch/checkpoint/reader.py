"""Read checkpoints lazily: a mapping of names to tensors that keeps no tensor in memory.

Safetensors files are read with plain file reads, not with a memory map. Mapped pages count as this process's memory
until the system drops them, whereas a buffer is freed together with its tensor.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fastmatch._internal.files import TORCH_SUFFIXES, load_state
from fastmatch._internal.json_files import read_json
from fastmatch._internal.ranks import ALONE, Ranks, deal
from fastmatch._internal.safetensors_file import Entry, read_entry, read_header
from fastmatch._internal.states import check_finite

__all__ = ["CONFIG", "INDEX", "SINGLE", "Checkpoint"]

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MODEL_INDEX = "model_index.json"
STEMS = ("model", "diffusion_pytorch_model")
REQUIRED = ("unet", "transformer")
"""Folders of a pipeline that are of no use to align without weights that can be read."""


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face directory, a .safetensors file or a torch file. Each is read on demand.

    Example:
        >>> from fastmatch.checkpoint import Checkpoint
        >>> checkpoint = Checkpoint("model-a")
        >>> checkpoint.headers["lm_head.weight"].shape  # reads no tensor
        torch.Size([32, 16])

    Args:
        path: a directory with model.safetensors or with shards and their index, a pipeline of diffusers, or a single file. If a directory has
            both, model.safetensors is read, as transformers does. Torch files are memory-mapped and read with
            ``weights_only``.
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
        self.metadata: dict[Path, dict[str, str]] = {}
        """File -> what the header of a safetensors file says besides."""
        self.parts: dict[str, Checkpoint] = {}
        """Of a pipeline of diffusers: name of a folder -> its tensors. Their names here start with the folder's."""
        self.index: Path | None = None
        """The index of a sharded checkpoint."""
        if self.path.is_dir():
            self.files = self._read_directory()
        elif not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        else:
            self.files = [self.path]
            if self.path.suffix in TORCH_SUFFIXES:
                self._loaded = load_state(self.path, mmap=True)
            else:
                self._entries, self.metadata[self.path] = read_header(self.path)

        self._versions = {file: _version(file) for file in self.files}

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
        tensor = self._read(name).to(self.device)
        self.seconds += time.perf_counter() - started
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded or self._entries)

    def __len__(self) -> int:
        return len(self._loaded or self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in self._entries

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._loaded[name] if self._loaded else read_entry(name, self._entries[name])
        file = self.path if self._loaded else self._entries[name].file
        if _version(file) != self._versions[file]:
            raise ValueError(f"{file}: tensor {name!r}: the file has changed since it was opened")
        return tensor

    def digest(self, ranks: Ranks = ALONE) -> str:
        """Return a hash of every name, shape, type and value; all tensors are read, and must be finite.

        Args:
            ranks: the processes that share the reading.

        Raises:
            ValueError: a tensor holds NaN or infinity, or cannot be read.
        """
        names = sorted(self)
        owners = deal([self.headers[name].numel() for name in names], ranks.size)
        tasks = [partial(self._digest_of, name) for name in names]
        found = ranks.share(tasks, owners, f"the tensors of {self.path.name}")
        return hashlib.blake2b(
            repr(list(zip(names, found, strict=True))).encode(), digest_size=32
        ).hexdigest()

    def _digest_of(self, name: str) -> str:
        tensor = self._read(name)
        check_finite({name: tensor}, str(self.path))
        total = hashlib.blake2b(repr((tuple(tensor.shape), str(tensor.dtype))).encode(), digest_size=32)
        if tensor.numel():
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def take_names(self, other: Checkpoint, tied: Iterable[Collection[str]]) -> None:
        """Give tensors that are stored twice in one of two checkpoints the names that ``other`` has.

        Args:
            other: the other checkpoint.
            tied: the names of each parameter of the model that has several. A name is added or dropped only if the
                checkpoint that has it holds the same values under another name of the parameter.
        """
        table: dict[str, Any] = self._loaded or self._entries
        for names in tied:
            for name in names:
                if (name in self) == (name in other):
                    continue
                holder = self if name in self else other
                twin = next((n for n in names if n in self and n in other), None)
                if twin is None or not torch.equal(holder[name], holder[twin]):
                    continue
                if holder is self:
                    del table[name]
                else:
                    table[name] = table[twin]
        self.__dict__.pop("headers", None)

    def _read_pipeline(self) -> list[Path]:
        """Read the networks in the folders of a pipeline of diffusers, by names that start with the folder's."""
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            if any(folder.glob("*.safetensors")) or folder.name in REQUIRED:
                part = self.parts[folder.name] = Checkpoint(folder, self.device)
                self._entries |= {f"{folder.name}.{name}": entry for name, entry in part._entries.items()}
                self.metadata |= part.metadata
        if not self.parts:
            raise FileNotFoundError(f"{self.path}: none of its folders holds weights in safetensors files")
        return [file for part in self.parts.values() for file in part.files]

    def _read_directory(self) -> list[Path]:
        if (self.path / MODEL_INDEX).is_file():
            return self._read_pipeline()
        single, index = weight_files(self.path)
        if single.is_file():
            self._entries, self.metadata[single] = read_header(single)
            return [single]
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.path}: holds neither {SINGLE} nor {INDEX}{_other_weights(self.path)}"
            )
        self.index = index
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a 'weight_map' of tensor names to files")
        shards: dict[str, dict[str, Entry]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or shard == ".." or len(shard) > 255:
                raise ValueError(
                    f"{index}: tensor {name!r} is mapped to {str(shard)[:80]!r}, which is not a plain file name"
                )
            if shard not in shards:
                file = self.path / shard
                if not os.path.isfile(file):  # also where the name is too long for the system
                    raise FileNotFoundError(
                        f"{index}: names {shard} for tensor {name!r}, but there is no such file"
                    )
                shards[shard], self.metadata[file] = read_header(file)
            if name not in shards[shard]:
                raise ValueError(f"{self.path / shard}: holds no tensor {name!r}, although the index says so")
        for shard, entries in shards.items():
            for name in entries:
                # One that the index leaves out is loaded all the same, as transformers does.
                if weight_map.get(name, shard) != shard or name in self._entries:
                    raise ValueError(
                        f"{self.path / shard}: holds tensor {name!r}, which is in another shard too; which one counts "
                        "is not clear"
                    )
            self._entries.update(entries)
        return [self.path / shard for shard in shards]


def _version(file: Path) -> tuple[int, ...] | None:
    """Return what differs when a file is written again; None if it has gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def weight_files(folder: Path) -> tuple[Path, Path]:
    """Return the paths that a folder's weights have: one file, or an index of shards. None of them may exist.

    transformers and diffusers name them differently, and a variant such as fp16 has its word before the suffix. Without
    a variant comes first.

    Raises:
        ValueError: there are several variants, and no weights without one.
    """
    variants: dict[str, tuple[Path, Path]] = {}
    for stem in STEMS:
        found = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if any(path.is_file() for path in found):
            return found
        for path in folder.glob(f"{stem}.*"):
            match = re.fullmatch(
                rf"{stem}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)", path.name
            )
            if match:
                word = match[1] or match[2]
                variants[word] = (
                    folder / f"{stem}.{word}.safetensors", folder / f"{stem}.safetensors.index.{word}.json",
                )  # fmt: skip
    if len(variants) > 1:
        raise ValueError(
            f"{folder}: holds weights of the variants {', '.join(sorted(variants))}, and none without; keep one of them"
        )
    return next(iter(variants.values()), (folder / SINGLE, folder / INDEX))


def _other_weights(folder: Path) -> str:
    """Return what an error can add about weights that a folder has in files of another name or format."""
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
    found = sorted({path.name for kind in kinds for path in folder.glob(kind)})
    if not found:
        return ""
    return f"; it has {', '.join(found[:3])}: load that with its library and save it with save_pretrained"
