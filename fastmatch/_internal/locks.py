"""Locks of outputs: one run at a time writes a path. A lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["hidden", "locked", "remove_locks"]


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")
"""The locks of the system: flock, or those of Windows."""

_held = threading.local()
"""``counts``: path -> how many nested blocks of this thread hold its lock."""


def hidden(path: Path, kind: str) -> Path:
    """Return the hidden file or folder beside an output that a run keeps there: ``.NAME.kind``."""
    return path.parent / f".{path.name}.{kind}"


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of an output; blocks of one thread may be nested.

    The lock is advisory, on the hidden file ``.NAME.lock``, which is removed at the end. If a run was killed, the file
    stays, but the system has dropped the lock. (Libraries for locks leave the file behind after every run.)

    Raises:
        BlockingIOError: another run, or another thread, writes this output.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    key = path.parent.resolve() / path.name
    counts: dict[Path, int] = _held.__dict__.setdefault("counts", {})
    if counts.get(key):
        counts[key] += 1
        try:
            yield
        finally:
            counts[key] -= 1
        return
    file = hidden(key, "lock")
    descriptor = _acquire(file, path)
    counts[key] = 1
    try:
        yield
    finally:
        del counts[key]
        _release(file, descriptor)


def remove_locks() -> None:
    """Remove the files of all locks that this thread holds: the process ends now, and the system drops the locks."""
    for key in _held.__dict__.get("counts", {}):
        with suppress(OSError):  # as on Windows, which removes no file that is open
            hidden(key, "lock").unlink(missing_ok=True)


def _acquire(file: Path, path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            if not hasattr(os, "O_NOFOLLOW") and file.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            descriptor = os.open(file, flags, 0o666)
        except OSError as error:
            reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise OSError(
                error.errno, f"cannot be written (its lock {file.name}: {reason})", str(path)
            ) from error
        try:
            _lock(descriptor, path)
            if _is_file(file, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(file: Path, descriptor: int) -> None:
    if (
        fcntl is None
    ):  # Windows removes no file that is open, neither here nor in another run that waits for it
        os.close(descriptor)
    # Removed while it is held: whoever opened it meanwhile sees that its name has gone, and tries again.
    with suppress(OSError):  # as where the disk has gone
        file.unlink(missing_ok=True)
    if fcntl is not None:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            message = "another run is writing this output; wait for it, or choose another path"
            raise BlockingIOError(errno.EAGAIN, message, str(path)) from error
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise  # else the file system has no locks


def _is_file(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
