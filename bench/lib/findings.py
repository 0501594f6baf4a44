"""Findings of a run that may be cut off: one JSON line each, written at once, and nothing stops the rest."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Findings", "read_findings"]


class Findings:
    """Writes findings to a file, part by part; each part has a budget of seconds.

    Args:
        path: file that lines are added to; None only prints them.
    """

    def __init__(self, path: Path | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path, self._part, self._begin, self._until = path, "", time.monotonic(), float("inf")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, name: str, **row: Any) -> None:
        """Write one finding."""
        at = round(time.monotonic() - self._begin, 1)
        found = {"part": self._part, "name": name, **row, "at": at}
        self.rows.append(found)
        line = json.dumps(found, default=str)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """Begin a part. No finding of it starts after ``seconds``; an error ends it, not the run."""
        self._part, self._until = name, time.monotonic() + seconds
        try:
            yield
        except Exception as error:
            self.note("part", **_failure(error))

    def attempt(self, name: str, function: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Run one finding and write the row that it returns, or its error; return the row, empty for an error."""
        if time.monotonic() > self._until:
            self.note(name, ok=False, error="not started: the part's time is used up", **more)
            return {}
        begin = time.monotonic()
        try:
            row = function()
        except Exception as error:
            self.note(name, **_failure(error), **more)
            return {}
        self.note(name, ok=True, **more, **row, wall_s=round(time.monotonic() - begin, 3))
        return row


def _failure(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in frames]
    return {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}", "where": where}


def read_findings(path: Path) -> list[dict[str, Any]]:
    """Return the findings of a file, in order."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
