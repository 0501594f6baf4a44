"""Commands that write checkpoints, killed at every event or with a full disk: ``python -m helpers.interrupted_runs``.

After each kill the output is missing, old or complete; the command is then repeated, with ``--resume`` where it takes
that, and has to end in the same bits and leave nothing else. With a full disk the command fails with status 2 and leaves
only its journal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.checkpoint import (
    MergeOptions,
    WriteOptions,
    align_checkpoints,
    align_many_checkpoints,
    apply_to_checkpoint,
    merge_checkpoints,
)
from fastmatch.cli.main import main
from helpers.interruptions import events_of, killed, with_limit

MODULE = """
import torch
from torch import nn
def build():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), torch.zeros(2, 6)
def loader():
    g = torch.Generator().manual_seed(3)
    return [torch.randn(20, 6, generator=g)]
"""
MODEL = ["--model", "interrupted_net:build"]


def _align(out: str, spec: fm.PermutationSpec, force: bool, resume: bool) -> None:
    align_checkpoints("A", "B", out, spec=spec, write=WriteOptions(force=force), resume=resume)


def _merge(out: str, spec: fm.PermutationSpec, force: bool, resume: bool) -> None:
    merge_checkpoints(["A", "B"], out, force=force)


def _apply(out: str, spec: fm.PermutationSpec, force: bool, resume: bool) -> None:
    alignment = fm.Alignment(spec.random(torch.Generator().manual_seed(7)), spec)
    apply_to_checkpoint(alignment, "B", out, force=force)


def _merge_many(out: str, spec: fm.PermutationSpec, force: bool, resume: bool) -> None:
    options = MergeOptions([0.5, 0.5])
    write = WriteOptions(force=force)
    align_many_checkpoints(["A", "B"], out, spec=spec, merge=options, write=write, resume=resume)


FOLDERS = {
    "align folders": _align, "merge folders": _merge, "apply to a folder": _apply,
    "align and merge folders": _merge_many,
}  # fmt: skip
"""What is done with the folders out of core, tensor by tensor."""


@dataclass(frozen=True)
class Case:
    """One command: its arguments, the name of its output, and whether it can resume."""

    name: str
    arguments: tuple[str, ...]
    out: str
    resumes: bool = False
    old: bool = False

    def run(self, *extra: str) -> int:
        """Run the command in the current folder and return its status."""
        if self.arguments[0] not in FOLDERS:
            return main([*self.arguments, "--out", self.out, *extra])
        import interrupted_net

        spec = fm.PermutationSpec.trace(*interrupted_net.build())
        try:
            FOLDERS[self.arguments[0]](self.out, spec, "--force" in extra, "--resume" in extra)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return 0


def cases() -> list[Case]:
    """The commands, in each format, in memory and out of core, to a new output and over an old one."""
    found = []
    for suffix in ("safetensors", "pt"):
        a, b, out = (f"{x}.{suffix}" for x in ("a", "b", "out"))
        align = ("align", a, b, *MODEL)
        found += [
            Case(f"align {suffix}", align, out),
            Case(f"align out of core {suffix}", (*align, "--out-of-core"), out, resumes=True),
            Case(f"merge {suffix}", ("merge", a, b, *MODEL), out),
            Case(
                f"renormalize {suffix}",
                (
                    "renormalize",
                    a,
                    "--endpoints",
                    a,
                    b,
                    *MODEL,
                    "--data",
                    "interrupted_net:loader",
                    "--weights",
                    "1",
                    "0",
                ),
                out,
            ),
            Case(f"align over an old {suffix}", (*align, "--out-of-core"), out, resumes=True, old=True),
        ]
    for name in FOLDERS:
        found.append(Case(name, (name,), "out", resumes="align" in name))
    found.append(Case("align over an old folder", ("align folders",), "out", resumes=True, old=True))
    return found


def prepare(folder: Path) -> None:
    """Write the inputs: files of both formats and folders of two shards, with B a permutation of A that is disturbed."""
    folder.mkdir()
    (folder / "interrupted_net.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    import interrupted_net

    model, x = interrupted_net.build()
    spec = fm.PermutationSpec.trace(model, x)
    g = torch.Generator().manual_seed(0)
    states = {"a": model.state_dict()}
    noisy = {k: v + 0.3 * torch.randn(v.shape, generator=g) for k, v in model.state_dict().items()}
    states["b"] = fm.Alignment(spec.random(g), spec).apply(noisy)
    for name, state in states.items():
        for suffix in ("safetensors", "pt"):
            save_state(state, folder / f"{name}.{suffix}")
        inner = folder / name.upper()
        (inner / "1_Pooling").mkdir(parents=True)
        (inner / "tokenizer.json").write_text("{}")
        (inner / "1_Pooling" / "config.json").write_text("{}")
        shards = {f"model-0000{i + 1}-of-00002.safetensors": sorted(state)[i::2] for i in range(2)}
        for file, names in shards.items():
            save_file({k: state[k].contiguous() for k in names}, inner / file, metadata={"format": "pt"})
        index = {"weight_map": {k: file for file, names in shards.items() for k in names}}
        (inner / "model.safetensors.index.json").write_text(json.dumps(index))


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    """The bytes of a file, or of all files in a folder; None for nothing."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_bytes() if path.exists() else None


class Bench:
    """A place to repeat a case in: the inputs, an output that is old or missing, and what a quiet run writes."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.out = case, folder, folder / case.out
        self.inputs = {p.name for p in folder.iterdir()}
        self.reset()
        self.old = contents(self.out)
        self.force = ["--force"] if case.old else []
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert case.run(*self.force) == 0, case.name
        self.expected = contents(self.out)
        assert self.expected not in (None, self.old)
        self.reset()

    def left(self) -> set[str]:
        """What is in the folder besides inputs and output."""
        return {p.name for p in self.folder.iterdir()} - self.inputs - {self.case.out, "__pycache__"}

    def reset(self) -> None:
        """Remove everything but the inputs, and put the old output there."""
        for name in [*self.left(), self.case.out]:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.case.old and "." in self.case.out:
            self.out.write_bytes(b"old")
        elif self.case.old:
            self.out.mkdir()
            (self.out / "old").write_text("old")

    def kill(self, at: int, again: int) -> None:
        """Kill a run at one event and a resumed one at another, judge what they left, repeat the run and judge that."""
        self.reset()
        killed(lambda: self.case.run(*self.force), self.folder, at)
        if self.case.resumes and contents(self.out) == self.old:
            killed(lambda: self.case.run("--resume", *self.force), self.folder, again)
        found = contents(self.out)
        assert found in (self.old, self.expected), (
            f"{self.case.name}: events {at}, {again}: a part is left under the name"
        )
        extra = ["--resume"] * self.case.resumes
        extra += ["--force"] * (found is not None)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            status = self.case.run(*extra)
        assert status == 0, f"{self.case.name}: events {at}, {again}: the repeated run says {said.getvalue()}"
        assert contents(self.out) == self.expected, (
            f"{self.case.name}: events {at}, {again}: the repeated run differs"
        )
        assert not self.left(), f"{self.case.name}: events {at}, {again}: {self.left()} is left"

    def limit(self, size: int) -> None:
        """Run with a limit on the size of files, and judge what is left."""
        self.reset()
        status = with_limit(lambda: self.case.run(*self.force), size)
        assert status in (0, 2), f"{self.case.name}: {size} bytes: status {status}"
        expected = self.expected if status == 0 else self.old
        assert contents(self.out) == expected, f"{self.case.name}: {size} bytes: status {status} and a part"
        kept = {f".{self.case.out}.journal", f".{self.case.out}.many"}
        journal = kept if status and self.case.resumes else set()
        assert self.left() <= journal, f"{self.case.name}: {size} bytes: {self.left()} is left"


def run(folder: Path, points: int, seed: int) -> Iterator[dict[str, Any]]:
    """Try every event and size of every case, or ``points`` of each, chosen by ``seed``; yield what was tried.

    Raises:
        AssertionError: something half-written is left, or a repeated run differs.
    """
    torch.set_num_threads(1)
    choose = random.Random(seed)
    prepare(folder / "work")
    os.chdir(folder / "work")
    for case in cases():
        bench = Bench(case, folder / "work")
        count = events_of(
            lambda case=case, bench=bench: case.run(*bench.force), bench.folder, folder / "count"
        )
        events = list(range(1, count + 1))
        chosen = sorted(choose.sample(events, min(points, count))) if points else events
        for at in chosen:
            bench.kill(at, choose.randint(1, count))
        largest = max(
            len(x)
            for x in (bench.expected.values() if isinstance(bench.expected, dict) else [bench.expected])
        )
        sizes = sorted({*range(0, largest, max(1, largest // 60)), 1, 7, 8, 9, largest - 1})
        sizes = sorted(choose.sample(sizes, min(points, len(sizes)))) if points else sizes
        for size in sizes:
            bench.limit(size)
        bench.reset()
        bench.out.unlink() if bench.out.is_file() else shutil.rmtree(bench.out, ignore_errors=True)
        yield {"case": case.name, "events": count, "kills": len(chosen), "sizes": len(sizes)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    for row in run(args.folder, args.points, args.seed):
        print(row, flush=True)
