"""Writing checkpoints tensor by tensor, in the layout of another one, whole or not at all."""

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

WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
)
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_like(
    source: Checkpoint,
    out: str | Path,
    transform: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Writes ``transform(name)`` for every tensor of ``source``, in the same files under the same names.

    Args:
        source: a directory gives a directory, with all its other files (config, tokenizer) copied; a file
            gives a file.
        out: the directory or file to write. It is written beside its place and renamed when complete.
        transform: gives the tensor to write; called once a name, so that one tensor is held at a time (a
            torch file is the exception: it is gathered before it is saved).
        dtype: element type of the floating point tensors; their own where left out.
        force: replace an output that exists.

    Raises:
        OSError: a write failed (a full disk): the message names file and tensor, and nothing is left behind.
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
            if file.is_file() and not file.name.endswith(WEIGHTS):
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
    """One safetensors file: the header is known before any tensor is, so tensors pass one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        like = source.headers[name]
        target = _target(like, dtype)
        begin, end = end, end + like.numel() * target.itemsize
        header[name] = {"dtype": NAMES[target], "shape": list(like.shape), "data_offsets": [begin, end]}
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
    """Gives a temporary folder beside ``path`` and renames it on success."""
    check_target(path, force=force)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            # A folder that is not empty cannot be renamed over: the old one steps aside first.
            aside = temporary.with_suffix(".old")
            path.rename(aside)
            try:
                temporary.rename(path)
            except OSError:
                aside.rename(path)
                raise
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
