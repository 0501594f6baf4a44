"""Run something in a forked child that is killed at a chosen event of the file system, or may write no large file."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["events_of", "killed", "with_limit"]

EVENTS = frozenset({
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link", "os.symlink",
})  # fmt: skip
"""Audit events of the interpreter that concern files."""

CALLS = ("write", "fsync", "ftruncate", "close", "replace", "rename", "unlink")
"""Functions of ``os`` to stop before and after: they raise no audit event, or one only before the change."""


class _Counter:
    """Counts the events of this process in a folder and acts at one of them."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.count = str(folder), at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        names = [os.fsdecode(x) for x in args if isinstance(x, (str, bytes, Path))]
        if event in EVENTS and any(self.folder in name for name in names):
            self()

    def install(self) -> None:
        sys.addaudithook(self.audit)
        for name in CALLS:
            self._wrap(os, name)
        from fastmatch._internal import renaming

        self._wrap(renaming, "_rename")

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            found = original(*args, **kwargs)
            self()
            return found

        setattr(owner, name, counted)


def _in_child(body: Callable[[], int]) -> int:
    """Call in a forked child, silently, and return what :func:`os.waitpid` says."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 70
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        status = body()
    finally:
        os._exit(status)


def events_of(run: Callable[[], int], folder: Path, note: Path) -> int:
    """Run in a child that is not killed, and return how many events there were."""

    def body() -> int:
        counter = _Counter(folder, -1)
        counter.install()
        status = run()
        note.write_text(str(counter.count))
        return status

    status = os.waitstatus_to_exitcode(_in_child(body))
    assert status == 0, f"status {status}"
    return int(note.read_text())


def killed(run: Callable[[], int], folder: Path, at: int) -> None:
    """Run in a child that is killed at its event number ``at``."""

    def body() -> int:
        _Counter(folder, at).install()
        return run()

    status = _in_child(body)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, f"status {status} at event {at}"


def with_limit(run: Callable[[], int], size: int) -> int:
    """Run in a child whose files may not grow beyond ``size`` bytes, and return its status."""

    def body() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return run()

    return os.waitstatus_to_exitcode(_in_child(body))
