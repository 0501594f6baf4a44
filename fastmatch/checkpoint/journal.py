"""The journal of an out-of-core alignment: one line per solved group, so that a killed run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.permutations.apply import check_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Journal", "fingerprint", "journal_path"]


def journal_path(out: str | Path) -> Path:
    """Return the path of the journal of a run that writes ``out``: a hidden file in the same folder."""
    out = Path(out)
    return out.parent / f".{out.name}.journal"


def fingerprint(a: Checkpoint, b: Checkpoint, spec: PermutationSpec, **settings: object) -> str:
    """Return a hash of what a run depends on: the files, their sizes and modification times, the spec, the settings."""
    files = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for c in (a, b) for f in c.files]
    text = json.dumps([files, spec.to_json(), sorted(settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """A file of JSON lines. The first line identifies the run, each further line holds one solved group.

    Args:
        path: the file.
        key: the run's :func:`fingerprint`.
        spec: the groups.
        resume: continue from the file's content; otherwise start a new file.

    Raises:
        ValueError: the file to resume from belongs to another run, or is damaged before its last line.
    """

    def __init__(self, path: Path, key: str, spec: PermutationSpec, *, resume: bool) -> None:
        self.path, self.spec = path, spec
        self.permutations: Permutations = {}
        """The groups solved so far, by this run and the one it continues."""
        self.stale: set[str] | None = None
        """The groups that have to be solved again; None for a new run."""
        lines: list[bytes] = []
        if resume and path.exists():
            # A run that was killed while writing leaves an incomplete last line: that group is solved again.
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
                    f"{self.path}: is the journal of another run (its files, spec or settings differ); "
                    "repeat that command, or start again without --resume"
                )
            for record in records[1:]:
                self.permutations |= {g: torch.tensor(p) for g, p in record["permutations"].items()}
                self.stale = set(record["stale"])
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path}: not a readable journal ({error!r})") from error
        self.permutations = check_permutations(self.permutations, spec, str(self.path))

    def add(self, group: str, permutations: Permutations, stale: set[str]) -> None:
        """Append the permutations of a solved group and of the groups within it, and sync the file to disk."""
        solved = [group, *(g.name for g in self.spec.groups.values() if g.within == group)]
        table = {name: permutations[name].tolist() for name in solved}
        record = {"permutations": table, "stale": sorted(stale)}
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file. Called when the output is complete."""
        self.path.unlink(missing_ok=True)
