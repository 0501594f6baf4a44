"""The journal of a streamed alignment: one line a solved group, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.permutations.apply import check_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Journal", "fingerprint"]


def fingerprint(a: Checkpoint, b: Checkpoint, spec: PermutationSpec, **settings: object) -> str:
    """What a run depends on: the files with their sizes and times of change, the spec and the settings."""
    files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for c in (a, b) for f in c.files]
    text = json.dumps([files, spec.to_json(), sorted(settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """Appends to a file of JSON lines; the first names the run, each other one a solved group.

    Args:
        path: the file.
        key: the run's :func:`fingerprint`.
        spec: the groups.
        resume: go on from what the file holds; otherwise begin it anew.

    Raises:
        ValueError: the file to go on from is of another run, or damaged before its last line.
    """

    def __init__(self, path: Path, key: str, spec: PermutationSpec, *, resume: bool) -> None:
        self.path, self.spec = path, spec
        self.permutations: Permutations = {}
        self.stale: set[str] | None = None
        lines: list[bytes] = []
        if resume and path.exists():
            # A run killed while it wrote leaves a last line without its end: that solve is done again.
            lines = path.read_bytes().splitlines(keepends=True)
            lines = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
        if lines:
            self._read(lines, key, spec)
        with path.open("wb") as file:
            file.writelines(lines or [json.dumps({"run": key}).encode() + b"\n"])

    def _read(self, lines: list[bytes], key: str, spec: PermutationSpec) -> None:
        try:
            records = [json.loads(line) for line in lines]
            if records[0]["run"] != key:
                raise ValueError(
                    f"{self.path}: is the journal of another run (files, spec or settings differ); "
                    "repeat that command, or leave --resume out to begin anew"
                )
            for record in records[1:]:
                self.permutations |= {g: torch.tensor(p) for g, p in record["permutations"].items()}
                self.stale = set(record["stale"])
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path}: not a readable journal ({error!r})") from error
        self.permutations = check_permutations(self.permutations, spec, str(self.path))

    def add(self, group: str, permutations: Permutations, stale: set[str]) -> None:
        """Notes what a group and those within it were solved to and which groups are still stale, safe on disk."""
        solved = [group, *(g.name for g in self.spec.groups.values() if g.within == group)]
        table = {name: permutations[name].tolist() for name in solved}
        record = {"permutations": table, "stale": sorted(stale)}
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Deletes the file: the output is complete."""
        self.path.unlink(missing_ok=True)
