"""Write a checkpoint tensor by tensor, in the files of another one, completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import torch

from fastmatch._internal.files import TORCH_SUFFIXES, check_target, save_state, writing
from fastmatch.checkpoint.reader import CONFIG, DTYPES, INDEX, Checkpoint, read_json

__all__ = ["write_like"]

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
)
"""Files with these endings hold weights and are not copied."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_like(
    source: Checkpoint,
    out: str | Path,
    transform: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Write ``transform(name)`` for every tensor of ``source``, in the same files and under the same names.

    Args:
        source: the checkpoint to imitate. For a directory, a directory is written and all other files (config,
            tokenizer) are copied. For a file, a file is written.
        out: the directory or file to write. It is written under a temporary name and renamed when it is complete.
        transform: returns the tensor to write. It is called once per name, so that one tensor is in memory at a time.
            A torch file is the exception: its tensors are collected before it is saved.
        dtype: element type for floating point tensors; by default each keeps its own.
        force: replace an output that exists.

    Raises:
        OSError: a write failed, for example on a full disk. The message names file and tensor, and nothing is kept.
    """
    out = Path(out)
    if not source.path.is_dir():
        if out.suffix in TORCH_SUFFIXES:
            save_state({k: _cast(transform(k), dtype) for k in source}, out, force=force)
            return
        with writing(out, force=force) as temporary:
            _write_file(source, list(source), temporary, out, transform, dtype)
        return
    with _writing_directory(out, force=force) as folder:
        for file in source.path.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copy2(file, folder / file.name)
        if dtype is not None and (folder / CONFIG).is_file():
            _set_dtype(folder / CONFIG, dtype)
        for file in source.files:
            _write_file(source, source.names_in(file), folder / file.name, out / file.name, transform, dtype)
        if (source.path / INDEX).is_file():
            index = read_json(source.path / INDEX)
            total = sum(t.numel() * _target(t, dtype).itemsize for t in source.headers.values())
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _target(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(_target(tensor, dtype))


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = read_json(path)
    name = str(dtype).removeprefix("torch.")
    config.update({key: name for key in ("dtype", "torch_dtype") if key in config})
    path.write_text(json.dumps(config, indent=2) + "\n")


def _write_file(
    source: Checkpoint,
    names: list[str],
    path: Path,
    final: Path,
    transform: Callable[[str], torch.Tensor],
    dtype: torch.dtype | None,
) -> None:
    """Write one safetensors file. Its header needs shapes and types only, so the tensors follow one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        like = source.headers[name]
        target = _target(like, dtype)
        begin, end = end, end + like.numel() * target.itemsize
        header[name] = {"dtype": DTYPE_NAMES[target], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    current = "header"
    with path.open("wb", buffering=0) as file:
        try:
            _write_all(file, memoryview(len(text).to_bytes(8, "little") + text))
            for name in names:
                current = f"tensor {name!r}"
                tensor = _cast(transform(name), dtype).detach().cpu().contiguous()
                if tensor.shape != source.headers[name].shape:
                    raise AssertionError(f"{current} changed its shape")
                if tensor.numel():
                    _write_all(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
        except OSError as error:
            message = f"{current} could not be written ({error.strerror}); nothing was kept"
            raise OSError(error.errno, message, str(final)) from error


def _write_all(file: FileIO, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data) :]


@contextmanager
def _writing_directory(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``path`` and rename it to ``path`` on success."""
    check_target(path, force=force)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            # A rename cannot replace a folder that is not empty, so the old folder is renamed first.
            old = temporary.with_suffix(".old")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
