"""Write a folder of torch.distributed.checkpoint through torch's own writer, tensor by tensor.

Torch's writer keeps all tensors of a file until the file is complete. So each part of a tensor has a file of its own, whose name does
not depend on the number of ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from fastmatch._internal.distributed_folder import DistributedFolder, Stored
from fastmatch._internal.ranks import Ranks, deal
from fastmatch._internal.torch_file import torch_sink

__all__ = ["write_distributed"]


def write_distributed(
    source: DistributedFolder,
    folder: Path,
    final: Path,
    read: Callable[[str], torch.Tensor],
    dtype_of: Callable[[torch.dtype], torch.dtype],
    ranks: Ranks,
) -> None:
    """Write the tensors of a folder anew, in the parts and under the keys of the source; ranks share the tensors.

    Args:
        source: the folder to imitate.
        folder: where to write; it exists.
        final: the name that it will have, for errors.
        read: name -> the tensor to write, of the source's shape.
        dtype_of: the source's element type -> the one to write.
        ranks: the processes.

    Raises:
        OSError: a write failed, for example on a full disk.
    """
    writer = _Writer(folder, final)
    headers = {stored.key: _header(stored, dtype_of(stored.dtype)) for stored in source.tensors.values()}
    plans = writer.prepare_global_plan([SavePlan(_items(key, header)) for key, header in headers.items()])
    tasks = [
        partial(_write, writer, plan, _Parts(partial(read, name)))
        for plan, name in zip(plans, source.tensors, strict=True)
    ]
    sizes = [stored.shape.numel() * stored.dtype.itemsize for stored in source.tensors.values()]
    found = ranks.share(tasks, deal(sizes, ranks.size), "the tensors of the output")
    if ranks.rank == 0:
        paths = source.metadata.planner_data
        metadata = Metadata(
            dict(headers), None if paths is None else {key: paths[key] for key in headers if key in paths}
        )
        writer.finish(metadata, [pickle.loads(data) for data in found])


def _header(stored: Stored, dtype: torch.dtype) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(begin, size) for *_, begin, size in stored.parts]
    return TensorStorageMetadata(TensorProperties(dtype), stored.shape, chunks)


def _items(key: str, header: TensorStorageMetadata) -> list[WriteItem]:
    return [
        WriteItem(
            MetadataIndex(key, chunk.offsets, k),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, header.properties, header.size),
        )
        for k, chunk in enumerate(header.chunks)
    ]


def _write(writer: FileSystemWriter, plan: SavePlan, parts: _Parts) -> bytes:
    """Write one tensor and return where it is; as bytes, so that what all ranks return shares no objects and pickles alike."""
    results: list[WriteResult] = writer.write_data(plan, parts).wait()
    parts.tensor = None
    return pickle.dumps(results)


class _Parts(DefaultSavePlanner):
    """The parts of one tensor, which is made when the first of them is written."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.make, self.tensor = read, None

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self.tensor is None:
            self.tensor = self.make().detach().cpu().contiguous()
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        part = self.tensor
        for dim, (begin, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, begin, size)
        return part.contiguous()


class _Writer(FileSystemWriter):
    """Torch's writer, whose files have the same bytes each time."""

    def __init__(self, path: Path, final: Path) -> None:
        # What it writes is synced when it is complete.
        super().__init__(path, single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _Files(path, final)

    def storage_meta(self) -> None:
        """Say nothing of the folder's name and of the time."""


class _Files(FileSystem):
    """Files whose errors name the output, and are not raised within torch's C++ code."""

    def __init__(self, path: Path, final: Path) -> None:
        self.path, self.final = path, final

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with torch_sink(Path(path), self.final / Path(path).relative_to(self.path)) as sink:
            yield sink
