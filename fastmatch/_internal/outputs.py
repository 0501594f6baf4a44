"""Outputs are written under a hidden name beside their own, and renamed when they are complete and on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastmatch._internal.locks import hidden, locked
from fastmatch._internal.renaming import discard, exchange, rename_new, sync, sync_tree
from fastmatch._internal.unfinished import unfinished

__all__ = ["Claim", "check_target", "claimed", "real_path", "writing"]


def real_path(path: str | Path) -> Path:
    """Return where a path leads. A link that leads to itself is where it is; ``Path.resolve`` raises RuntimeError for it before Python 3.13."""
    return Path(os.path.realpath(path))


def check_target(path: str | Path, *, force: bool = False, folder: bool = False) -> None:
    """Raise unless an output can be written to ``path``.

    Args:
        path: the file or folder to write.
        force: an existing one is replaced.
        folder: the output is a folder.

    Raises:
        FileExistsError: ``path`` exists and ``force`` is not set, or it is a device, a pipe or a socket.
        IsADirectoryError: ``path`` is a folder, which no file replaces.
        FileNotFoundError: the folder of ``path`` does not exist.
        PermissionError: it cannot be written.
        ValueError: ``path`` has no name of its own, as ``.`` and ``..``.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise ValueError(f"{path} is not the name of an output; give a file or folder in it")
    if os.path.lexists(path) and not force:
        raise FileExistsError(
            f"{path} exists; choose another path, or pass force=True (--force) to replace it"
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(
            f"{path} is a device, a pipe or a socket, which no output replaces; choose the name of a file"
        )
    if path.is_dir() and not folder:
        raise IsADirectoryError(f"{path} is a folder; choose the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{path.parent}: this folder cannot be written; choose another one for {path.name}"
        )


@dataclass(frozen=True)
class Claim:
    """An output that this run alone may write.

    Attributes:
        path: the output.
        part: where to write it. Nothing is there at first.
        force: whether :meth:`publish` replaces what has the output's name.
        before: device and inode of what had that name at first; None for nothing.
    """

    path: Path
    part: Path
    force: bool
    before: tuple[int, int] | None

    def publish(self) -> None:
        """Sync what was written and give it the name of the output.

        Raises:
            FileExistsError: something has the name that this run may not replace: anything without ``force``, a folder
                that was not there when the run began.
        """
        sync_tree(self.part)
        now = _identity(self.path)
        appeared = FileExistsError(
            f"{self.path} appeared while this run was at work; it was left alone, and nothing was written"
        )
        if now is None or not self.force:
            try:
                rename_new(self.part, self.path)
            except FileExistsError as error:
                raise appeared from error
        elif self.part.is_dir() or self.path.is_dir():
            if now != self.before:
                raise appeared
            exchange(self.part, self.path, hidden(self.path, "old"))
        else:
            self.part.replace(self.path)
        sync(self.path.parent)


@contextmanager
def claimed(path: str | Path, *, force: bool = False, folder: bool = False) -> Iterator[Claim]:
    """Hold the lock of an output, and remove what killed runs left of it. At the end remove what was not published.

    Raises:
        OSError: see :func:`check_target`; or another run writes this output.
    """
    path = Path(path)
    check_target(path, force=force, folder=folder)
    part, aside = hidden(path, "part"), hidden(path, "old")
    with unfinished(lambda: os.path.lexists(part) or os.path.lexists(aside)), locked(path):
        with _naming(path, part):
            if aside.is_dir() and not aside.is_symlink() and not os.path.lexists(path):
                aside.rename(path)  # a run was killed between two renames
            discard(aside)
            discard(part)
            check_target(path, force=force, folder=folder)
        try:
            with _naming(path, part):
                yield Claim(path, part, force, _identity(path))
        finally:
            with suppress(OSError):  # as where the disk has gone
                discard(part)


@contextmanager
def writing(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield the path of an empty file to write, and rename it to ``path`` on success.

    A run that fails or is killed leaves no partial file under ``path``.

    Raises:
        OSError: see :func:`check_target`; or another run writes this file, or a write failed.
    """
    with claimed(path, force=force) as claim:
        os.close(os.open(claim.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield claim.part
        claim.publish()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _naming(path: Path, part: Path) -> Iterator[None]:
    """Name the output in errors of the system that name no file, or only the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and not str(error.filename).startswith(str(part))):
            raise
        reason = error.strerror or os.strerror(error.errno)
        raise OSError(error.errno, f"cannot be written ({reason}); nothing was kept", str(path)) from error
