"""Write a checkpoint tensor by tensor, in the files of another one, completely or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastmatch._internal.files import TORCH_SUFFIXES, in_common
from fastmatch._internal.json_files import read_json
from fastmatch._internal.outputs import Claim, claimed
from fastmatch._internal.ranks import ALONE, Ranks, deal
from fastmatch._internal.safetensors_file import write_safetensors
from fastmatch._internal.states import check_finite
from fastmatch._internal.torch_file import save_torch
from fastmatch._internal.words import printable
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.checkpoint.side_files import copy_side_files

__all__ = ["write_like"]

log = logging.getLogger("fastmatch")


def write_like(
    source: Checkpoint,
    out: str | Path | Claim,
    transform: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write ``transform(name)`` for every tensor of ``source``, in the same files and under the same names.

    Args:
        source: the checkpoint to imitate. For a directory, a directory is written, and config, tokenizer and licences are
            copied; a warning of the logger ``fastmatch`` lists the files that are not. For a file, a file is written.
        out: the directory or file to write, or a claim of it. It is written under a temporary name and renamed when it is
            complete.
        transform: returns the tensor to write. It is called once per name, so that one tensor is in memory at a time.
            A torch file is the exception: the tensors of each one are collected before it is saved.
        dtype: element type for floating point tensors; by default each keeps its own.
        force: replace an output that exists.
        metadata: for the headers of safetensors files; by default each keeps its own.
        ranks: the processes that share the files of a directory; ``out`` is a claim then. Rank 0 writes all else.

    Raises:
        ValueError: a tensor to write holds NaN or infinity; it is named, and nothing is kept.
        OSError: a write failed, for example on a full disk. The message names file and tensor, and nothing is kept.
    """
    is_folder = source.path.is_dir()
    claim = nullcontext(out) if isinstance(out, Claim) else claimed(out, force=force, folder=is_folder)
    made = _Made(transform, dtype, metadata)
    with claim as held:
        if source.parts:
            _write_pipeline(source, held, made, ranks)
        elif is_folder:
            _write_folder(source, held.part, held.path, made, ranks)
        elif ranks.rank > 0:
            return
        elif held.path.suffix in TORCH_SUFFIXES:
            _save_torch(source, list(source), held.part, held.path, made)
        else:
            _write_file(source, source.path, held.part, held.path, made)
        if ranks.rank == 0:
            held.publish()


@dataclass(frozen=True)
class _Made:
    """What is written in the place of the source's tensors; the attributes are arguments of :func:`write_like`."""

    transform: Callable[[str], torch.Tensor]
    dtype: torch.dtype | None
    metadata: Mapping[str, str] | None

    def under(self, folder: str) -> _Made:
        """Return the same for a sub-folder, whose names are without the folder's."""
        return replace(self, transform=lambda name: self.transform(f"{folder}.{name}"))

    def dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        """Return the type in which a tensor is written."""
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype

    def tensor(self, name: str, final: Path) -> torch.Tensor:
        """Return a tensor as it is written to ``final``; another type, or a merge, may overflow."""
        tensor = self.transform(name)
        tensor = tensor.to(self.dtype_of(tensor))
        check_finite({name: tensor}, f"{final} is not written: the result")
        return tensor


def _write_pipeline(source: Checkpoint, claim: Claim, made: _Made, ranks: Ranks) -> None:
    if ranks.rank == 0:
        _begin_pipeline(source, claim)
    for name, part in source.parts.items():
        _write_folder(part, claim.part / name, claim.path / name, made.under(name), ranks)


def _begin_pipeline(source: Checkpoint, claim: Claim) -> None:
    """Make the folder of a pipeline, with what it has beside the networks that are read."""
    claim.part.mkdir()
    _log_left(
        source.path, claim.path, copy_side_files(source.path, claim.part, set(source.parts), whole=True)
    )


def _write_folder(source: Checkpoint, folder: Path, final: Path, made: _Made, ranks: Ranks) -> None:
    """Write a folder to ``folder``, which errors call ``final``."""
    if ranks.rank == 0:
        _begin_folder(source, folder, final, made.dtype)
    ranks.exchange(None, "the folder of the output")
    if source.distributed is not None:
        _write_distributed(source, folder, final, made, ranks)
        return
    sizes = [sum(source.headers[name].nbytes for name in source.names_in(file)) for file in source.files]
    for file, owner in zip(source.files, deal(sizes, ranks.size), strict=True):
        if owner == ranks.rank:
            _write_file(source, file, folder / file.name, final / file.name, made)
    ranks.exchange(None, "the files of the output")
    if ranks.rank == 0 and source.index is not None:
        index = read_json(source.index)
        own = [source.headers[name] for file in source.files for name in source.names_in(file)]
        total = sum(t.numel() * made.dtype_of(t).itemsize for t in own)
        known = index.get("metadata")
        index["metadata"] = {**(known if isinstance(known, dict) else {}), "total_size": total}
        (folder / source.index.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, part in source.modules.items():
        _write_folder(part, folder / name, final / name, made.under(name), ranks)


def _write_distributed(source: Checkpoint, folder: Path, final: Path, made: _Made, ranks: Ranks) -> None:
    """Write the tensors as torch.distributed.checkpoint does."""
    from fastmatch.checkpoint.distributed_writer import write_distributed

    assert source.distributed is not None
    if source.distributed.left_out and ranks.rank == 0:
        log.warning("%s: not carried from %s: %s", final, source.path, ", ".join(source.distributed.left_out))

    def dtype_of(dtype: torch.dtype) -> torch.dtype:
        return made.dtype_of(torch.empty(0, dtype=dtype, device="meta"))

    write_distributed(
        source.distributed, folder, final, lambda name: made.tensor(name, final), dtype_of, ranks
    )
    ranks.exchange(None, "the files of the output")


def _begin_folder(source: Checkpoint, folder: Path, final: Path, dtype: torch.dtype | None) -> None:
    """Make the folder, with what the source has beside its weights."""
    folder.mkdir()
    weights = {file.name for file in source.files} | {file.name for file in [source.index] if file}
    left = copy_side_files(source.path, folder, weights | set(source.modules))
    _log_left(source.path, final, left)
    if dtype is not None and (folder / CONFIG).is_file():
        _set_dtype(folder / CONFIG, dtype)


def _log_left(source: Path, final: Path, left: list[str]) -> None:
    """Say which files are not carried."""
    if left:
        names = printable(", ".join(left)).replace("\n", r"\n")
        log.warning("%s: not copied from %s: %s", final, source, names)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = read_json(path)
    name = str(dtype).removeprefix("torch.")
    config.update({key: name for key in ("dtype", "torch_dtype") if key in config})
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_file(source: Checkpoint, file: Path, path: Path, final: Path, made: _Made) -> None:
    """Write the tensors of one of the source's files to ``path``, which errors call ``final``."""
    names = source.names_in(file)
    if file.suffix in TORCH_SUFFIXES and final.suffix in TORCH_SUFFIXES:
        _save_torch(source, names, path, final, made)
        return
    headers = {name: source.headers[name].to(made.dtype_of(source.headers[name])) for name in names}
    # Large elements first, as the library orders them: it reads no tensor that is not aligned in the file.
    headers = dict(sorted(headers.items(), key=lambda item: -item[1].itemsize))
    kept = in_common([source.metadata.get(file, {})]) if made.metadata is None else made.metadata
    write_safetensors(path, final, headers, lambda name: made.tensor(name, final), kept)


def _save_torch(source: Checkpoint, names: list[str], path: Path, final: Path, made: _Made) -> None:
    """Write a torch file. Names that share a tensor in the source share one here, if both are equal still."""
    state: dict[str, torch.Tensor] = {}
    first: dict[object, str] = {}
    for name in names:
        tensor = made.tensor(name, final)
        twin = state.get(first.setdefault(source.place_of(name), name))
        state[name] = twin if twin is not None and torch.equal(twin, tensor) else tensor
    save_torch(state, path, final)
