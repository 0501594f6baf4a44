"""Rename without replacing, exchange two names, and make sure that what is on the disk stays there."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["discard", "exchange", "rename_new", "sync", "sync_tree"]

NOREPLACE, EXCHANGE = 1, 2
"""Flags of Linux' renameat2."""

AT_FDCWD = -100
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@cache
def _renameat2() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or another C library
        return None


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Call renameat2; False if the system or the file system cannot do it."""
    call = _renameat2()
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def rename_new(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``. Raise FileExistsError if there is one, in one step where the system can."""
    if not _rename(source, target, NOREPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        source.rename(target)


def exchange(source: Path, target: Path, aside: Path) -> None:
    """Give ``source`` the name ``target`` and what had it the name ``source``, in one step where the system can.

    Elsewhere what had the name is renamed to ``aside`` for a moment. A run that is killed then leaves it there.
    """
    if _rename(source, target, EXCHANGE):
        return
    target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(source)


def discard(path: Path) -> None:
    """Delete a file, a link (not what it names) or a folder; nothing if there is none."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with all that is in it."""
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            sync_tree(inner)
    sync(path)
