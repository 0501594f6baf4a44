"""Read checkpoints lazily: a mapping of names to tensors that keeps no tensor in memory.

Safetensors files are read with plain file reads, not with a memory map. Mapped pages count as this process's memory
until the system drops them, whereas a buffer is freed together with its tensor.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

import torch

from fastmatch._internal.distributed_folder import METADATA, DistributedFolder, Stored
from fastmatch._internal.files import TORCH_SUFFIXES, load_state
from fastmatch._internal.json_files import parse_json, read_json
from fastmatch._internal.safetensors_file import Entry, read_entry, read_header

__all__ = ["ADAPTER", "CONFIG", "INDEX", "SINGLE", "Checkpoint"]

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
MODEL_INDEX, MODULES, ADAPTER = "model_index.json", "modules.json", "adapter_config.json"
STEMS = ("model", "diffusion_pytorch_model", "adapter_model")
TORCH_STEMS = ("pytorch_model", "diffusion_pytorch_model", "adapter_model")
"""What files of weights are called: safetensors files, and torch files where a folder has no others."""
REQUIRED = ("unet", "transformer")
"""Folders of a pipeline that are of no use to align without weights that can be read."""


@dataclass(frozen=True)
class Mapped:
    """A tensor of a torch file, which is mapped into memory."""

    file: Path
    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        return self.tensor.shape


class Checkpoint(Mapping[str, torch.Tensor]):
    """The tensors of a Hugging Face directory, one of torch.distributed.checkpoint, a .safetensors file or a torch file. Each is read
    on demand.

    Example:
        >>> from fastmatch.checkpoint import Checkpoint
        >>> checkpoint = Checkpoint("model-a")
        >>> checkpoint.headers["lm_head.weight"].shape  # reads no tensor
        torch.Size([32, 16])

    Args:
        path: a directory with model.safetensors or pytorch_model.bin, or with shards and their index, an adapter of peft, a
            pipeline of diffusers, or a single file. If a directory has several, a whole file counts before shards, and safetensors
            files before torch files, as for transformers. Torch files are memory-mapped and read with
            ``weights_only``. Of a directory of torch.distributed.checkpoint the model is read: all tensors, or those under a key
            ``model`` or ``state_dict``.
        device: the device that tensors are moved to.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or has another format. The message names the file and, if there is one, the tensor.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self.seconds = 0.0
        """Seconds spent reading tensors so far."""
        self._entries: dict[str, Entry | Mapped | Stored] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        """File -> what the header of a safetensors file says besides."""
        self.parts: dict[str, Checkpoint] = {}
        """Of a pipeline of diffusers: name of a folder -> its tensors. Their names here start with the folder's."""
        self.modules: dict[str, Checkpoint] = {}
        """Of a folder of sentence-transformers: name of a sub-folder with a layer that reads the model's output -> its tensors. Their
        names here start with the folder's."""
        self.index: Path | None = None
        """The index of a sharded checkpoint."""
        self.distributed: DistributedFolder | None = None
        """What torch.distributed.checkpoint has written, if it wrote the directory."""
        if self.path.is_dir():
            self.files = self._read_directory()
            self._read_modules()
        elif not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file or folder")
        else:
            self.files = [self.path]
            self._entries.update(self._open(self.path))
        self._versions = {file: _version(file) for e in self._entries.values() for file in _files_of(e)}

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Name -> tensor on the meta device, which has a shape and type but no values."""
        return {k: torch.empty(v.shape, dtype=v.dtype, device="meta") for k, v in self._entries.items()}

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.headers.values())

    def names_in(self, file: Path) -> list[str]:
        """Return the names of the tensors in one of :attr:`files`, in the file's order."""
        found = [(k, v) for k, v in self._entries.items() if v.file == file]
        return [k for k, _ in sorted(found, key=lambda x: x[1].begin if isinstance(x[1], Entry) else 0)]

    def place_of(self, name: str) -> object:
        """Return what names that share one tensor in their file have in common."""
        entry = self._entries[name]
        if isinstance(entry, Entry):
            return entry
        if isinstance(entry, Stored):
            return entry.place
        tensor = entry.tensor
        return entry.file, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()

    def __getitem__(self, name: str) -> torch.Tensor:
        started = time.perf_counter()
        tensor = self._read(name).to(self.device)
        self.seconds += time.perf_counter() - started
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        self._check_unchanged(name, entry)
        if isinstance(entry, Stored):
            tensor = entry.folder.read(name, entry)
        else:
            # A map of a file that another program cuts ends this process where it is read, so nobody gets the map itself.
            tensor = entry.tensor.clone() if isinstance(entry, Mapped) else read_entry(name, entry)
        self._check_unchanged(name, entry)
        return tensor

    def _check_unchanged(self, name: str, entry: Entry | Mapped | Stored) -> None:
        for file in _files_of(entry):
            if _version(file) != self._versions[file]:
                raise ValueError(f"{file}: tensor {name!r}: the file has changed since it was opened")

    def on_host(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU, whatever :attr:`device` is."""
        started = time.perf_counter()
        tensor = self._read(name)
        self.seconds += time.perf_counter() - started
        return tensor

    def take_names(self, other: Checkpoint, tied: Iterable[Collection[str]]) -> dict[str, str]:
        """Give tensors that are stored twice in one of two checkpoints the names that ``other`` has.

        Args:
            other: the other checkpoint.
            tied: the names of each parameter of the model that has several. A name is added or dropped only if the
                checkpoint that has it holds the same values under another name of the parameter.

        Returns:
            Name that was added -> the name that the tensor has in the file.
        """
        table, added = self._entries, dict[str, str]()
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
                    added[name] = twin
        self.__dict__.pop("headers", None)
        return added

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names: ``names`` maps old ones to new ones, of which none is in use."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        self.__dict__.pop("headers", None)

    def _open(self, file: Path) -> dict[str, Entry | Mapped]:
        """Return the places of the tensors in one file."""
        if file.suffix in TORCH_SUFFIXES:
            return {name: Mapped(file, tensor) for name, tensor in load_state(file, mmap=True).items()}
        entries, self.metadata[file] = read_header(file)
        return dict(entries)

    def _read_pipeline(self) -> list[Path]:
        """Read the networks in the folders of a pipeline of diffusers, by names that start with the folder's."""
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            if any(path.is_file() for path in weight_files(folder)) or folder.name in REQUIRED:
                part = self.parts[folder.name] = Checkpoint(folder, self.device)
                self._entries |= {f"{folder.name}.{name}": entry for name, entry in part._entries.items()}
                self.metadata |= part.metadata
        if not self.parts:
            raise FileNotFoundError(f"{self.path}: none of its folders holds weights in safetensors files")
        return [file for part in self.parts.values() for file in part.files]

    def _read_modules(self) -> None:
        """Read the layers that sentence-transformers runs on the model's output, from the sub-folders that it lists."""
        file = self.path / MODULES
        if not file.is_file():
            return
        try:
            listed = parse_json(b'{"modules":' + file.read_bytes() + b"}")["modules"]
        except ValueError as error:
            raise ValueError(f"{file}: not readable as JSON ({error})") from error
        for entry in listed if isinstance(listed, list) else []:
            name = entry.get("path") if isinstance(entry, dict) else None
            if not _is_plain(name) or os.path.islink(self.path / name):
                continue
            folder = self.path / name
            if not os.path.isdir(folder):  # also where the system takes no such name
                continue
            if any(path.is_file() for path in weight_files(folder)):
                part = self.modules[name] = Checkpoint(folder, self.device)
                self._entries |= {f"{name}.{key}": value for key, value in part._entries.items()}

    def leave_modules(self) -> None:
        """Take the tensors of :attr:`modules` out of this checkpoint."""
        for name, part in self.modules.items():
            for key in part:
                del self._entries[f"{name}.{key}"]
        self.modules = {}
        self.__dict__.pop("headers", None)

    def _read_directory(self) -> list[Path]:
        if (self.path / MODEL_INDEX).is_file():
            return self._read_pipeline()
        single, index = weight_files(self.path)
        if single.is_file():
            self._entries.update(self._open(single))
            return [single]
        if not index.is_file() and (self.path / METADATA).is_file():
            self.distributed = DistributedFolder(self.path)
            self._entries |= self.distributed.tensors
            return self.distributed.files
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.path}: holds neither {SINGLE} nor {INDEX}, nor pytorch_model.bin{_other_weights(self.path)}"
            )
        self.index = index
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a 'weight_map' of tensor names to files")
        shards: dict[str, dict[str, Entry | Mapped]] = {}
        for name, shard in weight_map.items():
            if not _is_plain(shard):
                raise ValueError(
                    f"{index}: tensor {name!r} is mapped to {str(shard)[:80]!r}, which is not a plain file name"
                )
            if shard not in shards:
                file = self.path / shard
                if not os.path.isfile(file):  # also where the name is too long for the system
                    raise FileNotFoundError(
                        f"{index}: names {shard} for tensor {name!r}, but there is no such file"
                    )
                shards[shard] = self._open(file)
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


def _is_plain(name: object) -> TypeGuard[str]:
    """Whether this is the name of a file or of a folder beside an index, not a path to somewhere else."""
    return isinstance(name, str) and 0 < len(name) < 256 and Path(name).name == name and name != ".."


def _files_of(entry: Entry | Mapped | Stored) -> tuple[Path, ...]:
    """Return the files that hold a tensor."""
    return tuple(file for file, *_ in entry.parts) if isinstance(entry, Stored) else (entry.file,)


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
    a variant comes first, and safetensors files before torch files.

    Raises:
        ValueError: there are several variants, and no weights without one.
    """
    places = [(stem, ".safetensors") for stem in STEMS] + [(stem, ".bin") for stem in TORCH_STEMS]
    for stem, suffix in places:
        found = _whole_and_index(folder, stem, suffix, "")
        if any(path.is_file() for path in found):
            return found
        escaped = re.escape(suffix)
        pattern = re.compile(rf"{stem}(?:\.(\w+){escaped}|{escaped}\.index\.(\w+)\.json)")
        matches = [match for path in folder.glob(f"{stem}.*") if (match := pattern.fullmatch(path.name))]
        variants = sorted({match[1] or match[2] for match in matches})
        if len(variants) > 1:
            raise ValueError(
                f"{folder}: holds weights of the variants {', '.join(variants)}, and none without; keep one of them"
            )
        if variants:
            return _whole_and_index(folder, stem, suffix, f".{variants[0]}")
    return folder / SINGLE, folder / INDEX


def _whole_and_index(folder: Path, stem: str, suffix: str, variant: str) -> tuple[Path, Path]:
    return folder / f"{stem}{variant}{suffix}", folder / f"{stem}{suffix}.index{variant}.json"


def _other_weights(folder: Path) -> str:
    """Return what an error can add about weights that a folder has in files of another name or format."""
    if any(folder.glob("*.distcp")):
        return f"; it has .distcp files but no {METADATA}, which torch.distributed.checkpoint writes last: the save is not complete"
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
    found = sorted({path.name for kind in kinds for path in folder.glob(kind)})
    if not found:
        return ""
    return f"; it has {', '.join(found[:3])}: load that with its library and save it with save_pretrained"
