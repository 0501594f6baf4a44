"""The journal of an out-of-core alignment: every costly step, so that a killed run goes on and ends in the same bits."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmatch._internal.json_files import parse_json
from fastmatch._internal.locks import hidden
from fastmatch._internal.renaming import sync
from fastmatch._internal.unfinished import unfinished
from fastmatch.assignment import Assignment
from fastmatch.matching.ascent import Step
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Journal", "journal_path", "journaling"]

FAMILY, VERSION = "fastmatch-journal-", 3
FORMAT = f"{FAMILY}{VERSION}"
log = logging.getLogger("fastmatch")

WRITE = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def journal_path(out: str | Path) -> Path:
    """Return the path of the journal of a run that writes ``out``: a hidden file in the same folder."""
    return hidden(Path(out), "journal")


@contextmanager
def journaling(
    path: Path, run: Mapping[str, str], spec: PermutationSpec, *, resume: bool
) -> Iterator[Journal]:
    """Open the journal of a run. It is removed when the block ends well, or before the first step is in it.

    Args:
        path: the file.
        run: what the run depends on, by name: hashes of the inputs and the settings.
        spec: the groups.
        resume: repeat the steps in the file; otherwise start a new one.

    Raises:
        ValueError: the file is not a journal, is of another run, or is damaged before its last line.
        OSError: it cannot be written.
    """
    _check_file(path)
    with unfinished():
        try:
            file = os.open(path, WRITE | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(
                error.errno, f"the journal cannot be written ({error.strerror})", str(path)
            ) from error
        try:
            journal = Journal(path, file, run, spec, resume=resume)
            try:
                yield journal
            except BaseException:
                if not journal.count:
                    journal.remove()
                raise
            journal.remove()
        finally:
            os.close(file)


def _check_file(path: Path) -> None:
    """Refuse to read or write what this program did not make: links to other files, pipes, files of others."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a file of its own"
        raise ValueError(f"{path}: is {kind}, not a journal; remove it")
    with path.open("rb") as file:
        start = file.read(64)
    expected = f'{{"format": "{FORMAT}"'.encode()
    if not start.startswith(expected[: len(start)]):
        raise ValueError(f"{path}: {_other_kind(start)}")


def _other_kind(start: bytes) -> str:
    """Return what is wrong with a file that begins as no journal of this version does, and what to do."""
    found = re.match(rb'\{"format": "' + FAMILY.encode() + rb'(\d+)"', start)
    if found is None:
        return "is not a journal; remove it"
    age = "an older" if int(found[1]) < VERSION else "a newer"
    return (
        f"is a journal of {age} version of fastmatch (format {int(found[1])}, this one reads {VERSION}): finish that run "
        "with the version that began it, or remove the file and start again"
    )


class Journal:
    """A file of JSON lines. The first says what the run depends on, each further one holds one :class:`Step`.

    Every line ends in a hash of itself and all lines before, so lines of another run, or changed ones, are found.

    Args:
        path: the file's name, for errors.
        file: its descriptor.
        run, spec, resume: see :func:`journaling`.
    """

    def __init__(
        self, path: Path, file: int, run: Mapping[str, str], spec: PermutationSpec, *, resume: bool
    ) -> None:
        self.path, self.spec, self._file = path, spec, file
        self._chain = b""
        self._waiting: list[dict[str, Any]] = []
        self.count = 0
        """Steps in the file."""
        kept = self._read(run) if resume else 0
        os.ftruncate(file, kept)  # after a kill the last line may be half written: its step is done again
        os.lseek(file, 0, os.SEEK_END)
        if not kept:
            try:
                self._append({"format": FORMAT, "run": dict(run)})
                sync(path.parent)
            except BaseException:
                self.remove()
                raise
        self.count = len(self._waiting)
        if self.count:
            log.warning("%s: steps taken over from the run that was interrupted: %d", path, self.count)

    def _read(self, run: Mapping[str, str]) -> int:
        """Read the steps, and return the length of the whole lines."""
        with os.fdopen(os.dup(self._file), "rb") as file:
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        try:
            records = [self._checked(line) for line in lines]
            if records:
                self._compare(records[0]["run"], run)
            for record in records[1:]:
                self._step_of(record)  # every one is judged before the run begins
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: {error}" if type(error) is ValueError else self._damage(error)
            ) from error
        self._waiting = records[1:]
        return sum(map(len, lines))

    def _damage(self, error: Exception) -> str:
        return f"{self.path}: not a readable journal ({type(error).__name__}: {error})"

    def _checked(self, line: bytes) -> dict[str, Any]:
        body, _, mark = line.rstrip(b"\n").rpartition(b" ")
        chain = self._link(body)
        if mark != chain:
            raise ValueError("is damaged, or a line of it belongs to another run; remove it and start again")
        self._chain = chain
        return parse_json(body)

    def _link(self, body: bytes) -> bytes:
        return hashlib.blake2b(self._chain + body, digest_size=16).hexdigest().encode()

    def _compare(self, found: Mapping[str, str], run: Mapping[str, str]) -> None:
        other = [name for name in run if found.get(name) != run[name]]
        if other:
            raise ValueError(
                f"is the journal of another run (not the same: {', '.join(other)}); repeat that command, or start "
                "again without --resume"
            )

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the next step: the one in the file, or else a computed one, which is written and synced to the disk.

        Raises:
            ValueError: the file's next step is of another group.
        """
        if self._waiting:
            record = self._waiting.pop(0)
            if record["group"] != name:
                raise ValueError(
                    f"{self.path}: its next step is of group {record['group']!r}, not of {name!r}"
                )
            return self._step_of(record)
        step = compute()
        self.add(name, step)
        return step

    def waiting(self) -> list[Step]:
        """Return the steps in the file that are still to be repeated."""
        return [self._step_of(record) for record in self._waiting]

    def add(self, name: str, step: Step) -> None:
        """Append a step and sync the file to the disk."""
        record: dict[str, Any] = {"group": name, "value": step.value}
        record["permutations"] = {group: _text(p.numpy()) for group, p in step.permutations.items()}
        if step.solution is not None:
            found = step.solution
            numbers = [float(x) for x in (found.objective, found.gap, found.gap_bound)]
            record["solution"] = [_text(found.u), _text(found.v), numbers]
        self._append(record)
        self.count += 1

    def _append(self, record: Mapping[str, Any]) -> None:
        body = json.dumps(record).encode()
        chain = self._link(body)
        data = memoryview(body + b" " + chain + b"\n")
        try:
            while len(data):
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise OSError(
                error.errno, f"the journal could not be written ({reason})", str(self.path)
            ) from error
        self._chain = chain

    def _step_of(self, record: Mapping[str, Any]) -> Step:
        permutations: Permutations = {}
        for group, text in record["permutations"].items():
            permutations[group] = _permutation(text, self.spec.groups[group].size)
        value, solution = float(record["value"]), None
        if not math.isfinite(value):
            raise ValueError(f"holds the value {value}")
        if "solution" in record:
            u, v, numbers = record["solution"]
            size = self.spec.groups[record["group"]].size
            rows, columns = np.arange(size), permutations[record["group"]].numpy()
            first, second = (_array(text, np.dtype("<f8"), size) for text in (u, v))
            objective, gap, gap_bound = map(float, numbers)
            solution = Assignment(rows, columns, first, second, objective, gap, gap_bound)
        return Step(permutations, solution, value)

    def remove(self) -> None:
        """Delete the file."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def _text(values: np.ndarray) -> str:
    kind = "<i8" if values.dtype.kind in "iu" else "<f8"
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _array(text: str, dtype: np.dtype, size: int) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype)
    if len(values) != size:
        raise ValueError(f"holds {len(values)} numbers of a group of {size} units")
    return values.astype(dtype.newbyteorder("="))


def _permutation(text: str, size: int) -> torch.Tensor:
    values = _array(text, np.dtype("<i8"), size)
    if not np.array_equal(np.sort(values), np.arange(size)):
        raise ValueError("holds what is not a permutation")
    return torch.from_numpy(values)
