"""``njit`` for the kernels: numba's, with a cache on disk that follows every source and never makes a call fail.

numba's own cache hashes the file of a function and not those of the functions that it calls, fails where neither the
package nor a home can be written, and numbers its files through an index that two processes can both rewrite. Here each
compiled function is one file. Its name holds a hash of all sources of the kernels and one of the signature and processor,
and it is written under a temporary name and renamed: a reader finds all of it or nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import stat
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core import config as numba_config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

__all__ = ["folders", "njit"]

config: Any = numba_config  # its attributes come from the environment: no checker knows them

LOG = logging.getLogger("fastmatch.kernels")

PACKAGE = Path(__file__).parents[1]


def _hash_sources() -> str | None:
    """A hash of numba's version and of every source that compiled code may depend on; None if there are no sources."""
    paths = sorted(p for p in PACKAGE.rglob("*.py") if "triton" not in p.stem and "_triton" not in p.parts)
    if not paths:  # imported from an archive
        return None
    digest = hashlib.sha256(numba.__version__.encode())
    for path in paths:
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


# Read with the functions themselves: sources that change while the process runs are not what it compiles.
SOURCES = _hash_sources()


@functools.cache
def folders() -> tuple[Path, ...]:
    """Where compiled kernels are looked for, in this order, and saved, in the first that can be written.

    ``NUMBA_CACHE_DIR`` alone if it is set. Else ``__pycache__`` of the package, the user's cache directory and a
    private directory in the temporary folder.
    """
    if SOURCES is None:
        return ()
    # Installations of different versions must not remove each other's files.
    name = "fastmatch_kernels-" + hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
    if config.CACHE_DIR:
        return (Path(config.CACHE_DIR) / name,)
    found = [PACKAGE / "__pycache__"]
    user = Path(AppDirs("fastmatch", appauthor=False).user_cache_dir)
    if user.is_absolute():  # "~" stays where no home is known
        found.append(user / name)
    private = _private_folder()
    if private is not None:
        found.append(private / name)
    return tuple(found)


def _private_folder() -> Path | None:
    """A folder in the temporary one that nobody else can write to: what is loaded from it is run."""
    if not hasattr(os, "geteuid"):
        return None
    try:
        path = Path(tempfile.gettempdir()) / f"fastmatch-{os.geteuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return path if is_private else None


class _FileCache(_Cache):
    """The files of one function; see the module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        module = function.__module__.removeprefix("fastmatch_kernels.")
        self._name = f"{module}.{function.__qualname__}.{sys.implementation.cache_tag}"
        self._enabled = True

    @property
    def cache_path(self) -> Any:
        return str(folders()[0]) if folders() else None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        for folder in folders():
            _remove(folder.glob(f"{self._name}-*.nbc"))

    def _file(self, signature: Any, codegen: Any) -> str:
        key = repr((signature, codegen.magic_tuple())).encode()
        return f"{self._name}-{SOURCES}-{hashlib.sha256(key).hexdigest()[:20]}.nbc"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function of a signature, or None if no folder has it."""
        target_context.refresh()
        name = self._file(sig, target_context.codegen())
        for folder in folders() if self._enabled else ():
            try:
                payload = pickle.loads((folder / name).read_bytes())
                return CompileResult._rebuild(target_context, *payload)
            except FileNotFoundError:
                continue
            except Exception as error:  # unreadable or cut off by a full disk: compiled again
                LOG.debug("%s: %s", folder / name, error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Writes a compiled function to the first folder that takes it."""
        if data.library.has_dynamic_globals or not all(x.can_cache for x in data.lifted):
            return
        name = self._file(sig, data.codegen)
        for folder in folders() if self._enabled else ():
            if folder not in _unwritable and self._write(folder, name, data):
                return

    def _write(self, folder: Path, name: str, data: Any) -> bool:
        payload = dumps(data._reduce())
        # Not the process's number: containers that share a folder have the same ones.
        temporary = folder / f"{name}.{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(payload)
            temporary.replace(folder / name)
        except OSError as error:
            _unwritable.add(folder)
            _remove([temporary])
            if folder == folders()[-1]:
                LOG.warning(
                    "compiled kernels are not kept, every process compiles them: %s; "
                    "set NUMBA_CACHE_DIR to a folder that can be written",
                    error,
                )
            return False
        _remove(p for p in folder.glob(f"{self._name}-*.nbc") if f"-{SOURCES}-" not in p.name)
        return True


_unwritable: set[Path] = set()


def _remove(paths: Iterator[Path] | list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


class _Kernel(CPUDispatcher):
    """numba's compiled function, with the cache above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache: Any = _FileCache(self.py_func)

    def compile(self, sig: Any) -> Any:
        """Compiles or loads what a signature needs.

        Compiles under ``NUMBA_DISABLE_JIT`` too: the kernels' vector instructions have no form in Python.
        """
        if self.targetoptions.get("parallel"):
            _start_threads()
        with global_compiler_lock:
            disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
            try:
                return super().compile(sig)
            finally:
                config.DISABLE_JIT = disabled


@functools.cache
def _start_threads() -> None:
    """Starts numba's threads once. numba then sets the number of OpenMP's threads, which torch shares: it is set back."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


def njit(*, cache: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with the same options, by the cache above."""

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = _Kernel(function, targetoptions={"nopython": True, "boundscheck": None, **options})
        if not cache:
            kernel._cache.disable()
        return kernel

    return decorate
