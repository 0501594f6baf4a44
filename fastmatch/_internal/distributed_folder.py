"""Folders of torch.distributed.checkpoint: ``.metadata``, a pickle, and ``.distcp`` files that hold parts of tensors.

The pickle is read by an unpickler that knows only the classes of that format, and none of them runs code or is changed. Tensors are read
by torch's own reader, which loads them with ``weights_only``. Before that, the places that the metadata name are compared with
the files, so that nothing else is read and nothing larger than the files is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from fastmatch._internal.torch_file import check_archive
from fastmatch._internal.words import error_line

__all__ = ["METADATA", "DistributedFolder", "Stored"]

METADATA = ".metadata"
SUFFIX = ".distcp"

MODELS = ("model", "state_dict")
"""Keys under which training scripts save a model beside other things."""

LARGEST = 1 << 30
"""Bytes above which metadata are no metadata."""

FORMAT = "torch.distributed.checkpoint"
CLASSES = {
    f"{FORMAT}.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    f"{FORMAT}.filesystem": ("_StorageInfo",),
}  # fmt: skip
"""What the metadata are made of, besides numbers, texts and containers."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder.

    Attributes:
        folder: where it is.
        key: its name in the folder's metadata, which may have the key of the model in front.
        parts: (file, offset in it, length there, place in the tensor, shape) of each part.
    """

    folder: DistributedFolder
    key: str
    dtype: torch.dtype
    shape: torch.Size
    parts: tuple[tuple[Path, int, int, torch.Size, torch.Size], ...]

    @property
    def file(self) -> Path:
        """The file of the first part."""
        return self.parts[0][0]

    @property
    def place(self) -> object:
        """What no other tensor has."""
        return self.folder.path, self.key


class DistributedFolder:
    """The tensors of a model in a folder; none is read before it is asked for.

    Args:
        path: the folder.

    Attributes:
        tensors: name -> its place.
        left_out: the keys of what is beside the model, such as an optimizer.
        metadata: what torch has written about the folder.

    Raises:
        ValueError: the metadata are damaged, hold something else than that, name other files, or no model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not torch.distributed.is_available():
            raise ValueError(
                f"{path}: this torch is built without torch.distributed, which reads such folders"
            )
        self.metadata = _read_metadata(path / METADATA)
        try:
            keys, self.left_out = self._keys()
            sizes: dict[str, int] = {}
            self.tensors = {name: self._stored(key, sizes) for name, key in keys.items()}
        except _Refused as error:
            raise ValueError(f"{path / METADATA}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{path / METADATA}: {_damage(error)}") from error
        self.files = [path / METADATA, *dict.fromkeys(p[0] for t in self.tensors.values() for p in t.parts)]

    def _keys(self) -> tuple[dict[str, str], list[str]]:
        """Return the names of the model's tensors with their keys, and the keys of everything else."""
        named = self.metadata.planner_data or {}
        paths = {key: tuple(named.get(key, (key,))) for key in self.metadata.state_dict_metadata}
        models = {path[: i + 1] for path in paths.values() for i in range(len(path) - 1) if path[i] in MODELS}
        if len(models) > 1:
            raise _Refused(
                f"holds several models: {', '.join('.'.join(m) for m in sorted(models))}; save one of them alone"
            )
        prefix = next(iter(models), ())
        inside = {key: path[len(prefix) :] for key, path in paths.items() if path[: len(prefix)] == prefix}
        found: dict[str, str] = {}
        for key, rest in inside.items():
            name = ".".join(map(str, rest))
            if name in found:
                raise _Refused(f"has two entries that are called {name!r}")
            if hasattr(self.metadata.state_dict_metadata[key], "chunks"):
                found[name] = key
            elif not name.endswith("_extra_state"):
                raise _Refused(
                    f"entry {key!r} is no tensor; save the state dict of the model alone, or under the key 'model'"
                )
        if not found:
            raise _Refused("holds no tensors")
        return found, sorted({str(paths[key][0]) for key in paths.keys() - inside.keys()})

    def _stored(self, key: str, sizes: dict[str, int]) -> Stored:
        """Return the place of a tensor, once it is known to be in the files."""
        header = self.metadata.state_dict_metadata[key]
        shape, dtype = torch.Size(header.size), header.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise _Refused(f"tensor {key!r} has the type {dtype!r}")
        parts = []
        for chunk in header.chunks:
            begin, size = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
            info = self._info(key, begin)
            file = self._file(key, info.relative_path, sizes)
            is_inside = len(begin) == len(size) == len(shape) and all(
                min(at, n) >= 0 and at + n <= whole for at, n, whole in zip(begin, size, shape, strict=True)
            )
            is_held = info.offset >= 0 and info.length > 0 and info.offset + info.length <= sizes[file.name]
            if not is_inside or not is_held or math.prod(size) * dtype.itemsize > info.length:
                raise _Refused(
                    f"tensor {key!r} of shape {tuple(shape)} has a part that is not in {file.name}"
                )
            parts.append((file, info.offset, info.length, begin, size))
        if not parts or not _cover([(begin, size) for *_, begin, size in parts], shape):
            raise _Refused(
                f"tensor {key!r} of shape {tuple(shape)} is not covered once by its {len(parts)} parts"
            )
        return Stored(self, key, dtype, shape, tuple(parts))

    def _info(self, key: str, begin: torch.Size) -> Any:
        from torch.distributed.checkpoint import metadata

        info = self.metadata.storage_data[metadata.MetadataIndex(key, begin)]
        if not (type(info.relative_path) is str and type(info.offset) is int and type(info.length) is int):
            raise _Refused(f"tensor {key!r} has no place in a file")
        if getattr(info, "transform_descriptors", None):
            raise _Refused(
                f"tensor {key!r} is stored by an extension ({info.transform_descriptors}), which is not read"
            )
        return info

    def _file(self, key: str, name: str, sizes: dict[str, int]) -> Path:
        file = self.path / name
        if name not in sizes:
            if Path(name).name != name or not name.endswith(SUFFIX) or len(name) > 255:
                raise _Refused(
                    f"tensor {key!r} is in {name[:80]!r}, which is not a {SUFFIX} file of this folder"
                )
            if not file.is_file():
                raise _Refused(f"tensor {key!r} is in {name}, but there is no such file")
            sizes[name] = file.stat().st_size
        return file

    def read(self, name: str, stored: Stored) -> torch.Tensor:
        """Read one tensor into memory.

        Raises:
            ValueError: a file cannot be read.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if not tensor.numel():
            return tensor
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({stored.key: tensor}, self.metadata, is_coordinator=True)
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        try:
            for file, offset, length, *_ in stored.parts:
                with file.open("rb") as opened:
                    check_archive(_Part(opened, offset, length), length)  # type: ignore[arg-type]
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(planner.finish_plan(plan), planner).wait()
        except Exception as error:  # torch raises many types for damaged files
            raise ValueError(
                f"{stored.file}: tensor {name!r} cannot be read ({error_line(error)})"
            ) from error
        return tensor


class _Refused(ValueError):
    """What is wrong with metadata that can be read."""


def _cover(boxes: list[tuple[torch.Size, torch.Size]], shape: torch.Size) -> bool:
    """Return whether boxes, (begin, size) each, are the cells of a grid that covers a shape, as shards of a mesh are."""
    boxes = [(begin, size) for begin, size in boxes if math.prod(size)]
    if not math.prod(shape):
        return not boxes
    cuts = [sorted({begin[d] for begin, _ in boxes}) for d in range(len(shape))]
    ends = [dict(zip(at, [*at[1:], whole], strict=True)) for at, whole in zip(cuts, shape, strict=True)]
    is_grid = all(at + n == end[at] for box in boxes for at, n, end in zip(*box, ends, strict=True))
    starts = {begin for begin, _ in boxes}
    return is_grid and len(starts) == len(boxes) == math.prod(map(len, cuts)) and (0,) * len(shape) in starts


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = max(0, start + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        self.file.seek(self.begin + self.at)
        data = self.file.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data


def _read_metadata(path: Path) -> Any:
    """Return the metadata in a file, of which nothing is run."""
    from torch.distributed.checkpoint import metadata

    try:
        if path.stat().st_size > LARGEST:
            raise _Refused(f"has more than {LARGEST} bytes")
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise _Refused(f"holds {type(found).__name__}")
        tables = [found.state_dict_metadata, found.storage_data, found.planner_data or {}]
        if not all(isinstance(table, dict) for table in tables) or not found.state_dict_metadata:
            raise _Refused("has no table of tensors")
        if not all(type(key) is str for key in found.state_dict_metadata):
            raise _Refused("has tensors without a name")
    except Exception as error:  # whatever the bytes of a pickle do
        raise ValueError(f"{path}: {_damage(error)}") from error
    return found


class _Unpickler(pickle._Unpickler):
    """Reads metadata, and refuses every name that is not of that format, and states of anything but new objects of it.

    That is Python's own implementation: a subclass of the one in C cannot see which object a state is given to.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Give an object its state: a class, a function or a member of an enumeration is everybody's, and is left as it is."""
        given_to = type(self.stack[-2])  # pyright: ignore[reportAttributeAccessIssue]
        if given_to.__name__ not in CLASSES.get(given_to.__module__, ()) or issubclass(given_to, Enum):
            raise _Refused(f"changes a {given_to.__name__}, which is not part of the format")
        super().load_build()  # pyright: ignore[reportAttributeAccessIssue]

    dispatch[pickle.BUILD[0]] = load_build

    def get_extension(self, code: int) -> None:
        """Refuse a name that a program has registered under a number: it may be known already, and is not asked for then."""
        raise _Refused(f"names extension {code}, which is not part of the format")

    def find_class(self, module: str, name: str) -> Any:
        if name in CLASSES.get(module, ()):
            found = __import__(module, fromlist=[name])
            return getattr(found, name)
        if module == "torch":
            found = vars(torch).get(name)  # asked for another name, torch would import modules
            if isinstance(found, torch.dtype) or found is torch.Size:
                return found
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch.serialization", "_get_layout"): _layout,
            ("builtins", "getattr"): _member,  # of an enumeration, as some versions of Python write it
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) in known:
            return known[module, name]
        if module.startswith("pathlib") and name.endswith("Path"):
            return _text_of_path
        named = ascii(f"{module}.{name}")[1:-1]  # a file may name anything, a line break included
        raise _Refused(f"names {named}, which is not part of the format")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("refers to something outside of the file")


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise _Refused(f"names the layout {name!r}")
    return torch.strided


def _member(*of: Any) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    found = [member for member in _MEM_FORMAT_ENCODING if of == (_MEM_FORMAT_ENCODING, member.name)]
    if not found:
        raise _Refused("asks for attributes")
    return found[0]


def _text_of_path(*parts: str) -> str:
    return "/".join(map(str, parts))


def _damage(error: Exception) -> str:
    if isinstance(error, _Refused):
        return f"these are no metadata of a model by {FORMAT}: {error}"
    return f"not readable as metadata of {FORMAT} ({error_line(error)})"
