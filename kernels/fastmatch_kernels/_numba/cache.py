"""``njit`` for the kernels: numba's, with a cache on disk that follows every source and never makes a call fail.

numba's own cache hashes the file of a function and not those of the functions that it calls, fails where neither the
package nor a home can be written, and numbers its files through an index that two processes can both rewrite. Here each
compiled function is one file. Its name holds numba's version, a hash of all sources of the kernels and one of the
signature and processor. It is written under a temporary name and renamed: a reader finds all of it or nothing.

What is loaded is run. So the user's cache folder and the temporary one are used only if nobody else can write to them.
"""

from __future__ import annotations

import errno
import functools
import gc
import hashlib
import logging
import os
import pickle
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

__all__ = ["compiled", "folders", "is_kept", "njit"]

config: Any = numba_config  # its attributes come from the environment: no checker knows them

LOG = logging.getLogger("fastmatch_kernels")

PACKAGE = Path(__file__).parents[1]

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
"""Errors after which a process does not try a folder again; a full disk may have room later. EEXIST: a file is in the
folder's place."""

LEFTOVER_SECONDS = 86400
"""Age from which a temporary file belongs to a process that died while it wrote."""


def _hash_sources() -> str | None:
    """A hash of every source that compiled code may depend on; None if there are no sources."""
    paths = sorted(p for p in PACKAGE.rglob("*.py") if "triton" not in p.stem and "_triton" not in p.parts)
    if not paths:  # imported from an archive
        return None
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


# Read with the functions themselves: sources that change while the process runs are not what it compiles.
SOURCES = _hash_sources()


@functools.cache
def folders() -> tuple[Path, ...]:
    """Cache folders in order. Kernels are loaded from the first that has them and saved to the first that is writable.

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
    """A folder of this user in the temporary one, or None if there is none that only this user can write to."""
    if not hasattr(os, "geteuid"):
        return None
    try:
        path = Path(tempfile.gettempdir()) / f"fastmatch-{os.geteuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    return path if _is_trusted(path) else None


def _is_trusted(folder: Path) -> bool:
    """Whether this is a directory, not a link to one, that belongs to this user and that nobody else can write to."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):  # Windows: access lists protect the user's folder
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_chosen(folder: Path) -> bool:
    """Whether the folder is as safe as the package or was named by the user, so that it needs no check."""
    return bool(config.CACHE_DIR) or folder == PACKAGE / "__pycache__"


def is_kept(kernel: Any) -> bool:
    """Whether a cache folder has the kernel, compiled from these sources for some type of its arguments."""
    kept = f"{kernel._cache._name}-{SOURCES}-*.nbc"
    return any(next(folder.glob(kept), None) is not None for folder in folders())


_missing: list[str] = []
"""Files that no folder had, so that what is in them is compiled."""


def compiled() -> int:
    """Return how many functions this process has begun to compile, because no folder has them."""
    return len(_missing)


class _FileCache(_Cache):
    """The files of one function; see the module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        package, _, module = function.__module__.partition(".")
        self._name = (
            f"{module}.{function.__qualname__}.{sys.implementation.cache_tag}-numba{numba.__version__}"
        )
        # The file's name says nothing of sources elsewhere, nor of the values that a closure holds.
        self._is_covered = package == "fastmatch_kernels" and function.__closure__ is None
        self._enabled = self._is_covered

    @property
    def cache_path(self) -> Any:
        return str(folders()[0]) if folders() else None

    def enable(self) -> None:
        self._enabled = self._is_covered

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
            if not _is_chosen(folder) and not _is_trusted(folder):
                continue
            try:
                payload = pickle.loads((folder / name).read_bytes())
                return CompileResult._rebuild(target_context, *payload)
            except FileNotFoundError:
                continue
            except Exception as error:  # unreadable or cut off by a full disk: compiled again
                LOG.debug("%s: %s", folder / name, error)
        _missing.append(name)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Writes a compiled function to the first folder that takes it."""
        if data.library.has_dynamic_globals or not all(x.can_cache for x in data.lifted):
            return
        if not self._enabled or not folders():
            return
        name, payload = self._file(sig, data.codegen), dumps(data._reduce())
        for folder in folders():
            if folder in _unwritable:
                continue
            try:
                self._write(folder, name, payload)
                return
            except OSError as error:
                if error.errno in UNWRITABLE:
                    _unwritable.add(folder)
                if folder == folders()[-1]:
                    _warn(folder, error.strerror)

    def _write(self, folder: Path, name: str, payload: bytes) -> None:
        if _is_chosen(folder):
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_trusted(folder):
                raise PermissionError(errno.EPERM, "others can write to it, or it belongs to somebody else")
        # Not the process's number: containers that share a folder have the same ones.
        temporary = folder / f"{name}.{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(payload)
            temporary.replace(folder / name)
        except OSError:
            _remove([temporary])
            raise
        # Of this version of numba only: environments with different ones may share the sources.
        _remove(p for p in folder.glob(f"{self._name}-*.nbc") if f"-{SOURCES}-" not in p.name)
        _remove(p for p in folder.glob("*.nbc.*") if _is_leftover(p))


_unwritable: set[Path] = set()


@functools.cache
def _warn(folder: Path, reason: str) -> None:
    """Says once per folder and reason that nothing is kept."""
    LOG.warning(
        "compiled kernels are not kept, every process compiles them: %s: %s; "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        folder,
        reason,
    )


def _is_leftover(temporary: Path) -> bool:
    try:
        return time.time() - temporary.lstat().st_mtime > LEFTOVER_SECONDS
    except OSError:  # its process renamed it
        return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


if hasattr(os, "register_at_fork"):
    # A child that is forked while another thread compiles would wait for ever for that thread's lock.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


class _Kernel(CPUDispatcher):
    """numba's compiled function, with the cache above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._cache: Any = _FileCache(self.py_func)

    def compile(self, sig: Any) -> Any:
        """Compiles or loads what a signature needs.

        Compiles under ``NUMBA_DISABLE_JIT`` too: the kernels' vector instructions have no form in Python.
        """
        with global_compiler_lock, _without_collections():
            disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
            try:
                return super().compile(sig)
            finally:
                config.DISABLE_JIT = disabled


class _InnerKernel(_Kernel):
    """A kernel that only kernels can call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.py_func.__qualname__} was compiled for kernels only; Python cannot call it")


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector: it takes a sixth of a compilation to look at objects that all stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def njit(
    *, cache: bool = True, inner: bool = False, borrows: bool = False, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with the same options, by the cache above.

    Args:
        cache: keep the compiled function on disk.
        inner: only kernels call it, as they alone call what is inlined: its wrapper for Python, up to a third of its
            compilation, is left out.
        borrows: it makes no array and returns none, so that all are the caller's, and numba need not count references to
            them. Counts are atomic, and beside the steps of a small solve they take time.
        options: numba's.
    """
    inner = inner or options.get("forceinline", False)
    settings = {
        "nopython": True,
        "boundscheck": None,
        "no_cfunc_wrapper": True,  # for passing functions to compiled code
        "no_cpython_wrapper": inner,
        "_nrt": not borrows,
        "forceinline": False,  # numba would take it, if it is not said, from the function that is compiled at the time
    }

    def decorate(function: Callable[..., Any]) -> Any:
        kernel = (_InnerKernel if inner else _Kernel)(function, targetoptions={**settings, **options})
        if not cache:
            kernel._cache.disable()
        return kernel

    return decorate
