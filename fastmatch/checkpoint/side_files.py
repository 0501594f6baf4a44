"""Which files of a checkpoint's folder are carried to a new one: those that say how to use it, and no others.

Weights in other files would stay as they were and no longer match. A model card describes the old weights. A link may
lead anywhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fastmatch._internal.files import TORCH_SUFFIXES
from fastmatch.checkpoint.reader import CONFIG

__all__ = ["copy_side_files"]

CARRIED_SUFFIXES = frozenset(
    {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".codes", ".spm", ".yaml", ".yml"}
)
"""Configs, tokenizers and templates."""

LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
WEIGHTS = TORCH_SUFFIXES | {".safetensors", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb"}
LARGEST = 1 << 28
"""Bytes above which a file is no config or tokenizer."""


def copy_side_files(source: Path, target: Path, weights: set[str], *, whole: bool = False) -> list[str]:
    """Copy the config, tokenizer, templates and licences of a folder, and return the names of what was left behind.

    A sub-folder is copied if all of it can be.

    Args:
        source, target: the folders.
        weights: the names of the files and folders that are written otherwise, which are not reported.
        whole: the folder is a pipeline, whose other sub-folders hold networks that do not change: what can be carried of
            each is copied, with its weights.
    """
    left = []
    for path in sorted(source.iterdir()):
        if path.name in weights or path.name.startswith("."):
            continue
        if whole and path.is_dir() and not path.is_symlink():
            left += [f"{path.name}/{name}" for name in _copy_network(path, target / path.name, source)]
        elif path.is_dir() and not path.is_symlink() and _is_carried_whole(path, source):
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns(".*"))
        elif path.is_file() and _is_carried(path, source):
            shutil.copyfile(path, target / path.name)
        else:
            left.append(path.name + "/" * path.is_dir())
    return left


def _copy_network(folder: Path, target: Path, source: Path) -> list[str]:
    """Copy a network that does not change, and return the names of what was left behind."""
    left = []
    target.mkdir()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            left += [f"{path.name}/{name}" for name in _copy_network(path, target / path.name, source)]
        elif path.is_file() and (_is_carried(path, source) or (_is_weights(path) and _stays(path, source))):
            shutil.copyfile(path, target / path.name)
        else:
            left.append(path.name + "/" * path.is_dir())
    return left


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHTS or path.name.endswith(".index.json")


def _is_carried_whole(folder: Path, source: Path) -> bool:
    inner = [path for path in folder.rglob("*") if not path.name.startswith(".")]
    return all((p.is_dir() and not p.is_symlink()) or (p.is_file() and _is_carried(p, source)) for p in inner)


def _is_carried(path: Path, source: Path) -> bool:
    if path.name.endswith(".index.json") or path.stat().st_size > LARGEST:
        return False
    named = path.name == CONFIG or path.suffix in CARRIED_SUFFIXES or path.name.startswith(LICENCES)
    return named and _stays(path, source)


def _stays(path: Path, source: Path) -> bool:
    """Whether a file is in the folder, or in the store of files beside it that Hugging Face's cache links to."""
    real, root = path.resolve(), source.resolve()
    if real.is_relative_to(root):
        return True
    return any(
        folder.parent.name == "snapshots" and real.is_relative_to(folder.parent.parent / "blobs")
        for folder in (root, *root.parents)
    )
