"""Alignment of Stable Diffusion files of full size: time against a bound, peak memory, and what is recovered.

    python -m bench.reports.diffusion_alignment --dir /tmp/bench

Files of random numbers have the names and shapes of real ones, in float16. Two pairs are aligned: "planted", where B is A with
noise of a tenth of each tensor's standard deviation, permuted at random; and "random", where A and B have nothing in common. Every
alignment runs in a process of its own, with one thread, because other work shares the machine: seconds are of the processor.

The bound is the time to read both files and to write one, once, and to compute the gain matrix of every assignment of the
run once, at the rates that the same process measures for plain reads, writes and float32 products. Assignments,
checks in float64 and everything else count against us.

Every file is proved by a reduced model in float64. "Change at full size": B and the result, run whole in float64 on the same
random inputs, and the largest change of an output relative to its largest entry.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.lib import record
from bench.lib.diffusion_files import noisy, plant, write_random
from bench.lib.diffusion_shapes import listed_shapes
from bench.lib.machine import peak, product_rate
from fastmatch._internal.huge_pages import ask_for_huge_pages
from fastmatch.spec import PermutationSpec

NAME = "diffusion_alignment"
ROOT = Path(__file__).parents[2]
FILES = {"SD 1.5": "sd1-ldm", "SDXL": "sdxl-sgm"}
PAIRS = ("planted", "random")
WHOLE = ("SD 1.5",)
"""Models whose largest network fits the memory in float64."""
NOISE = 0.1


def transfer_seconds(source: Path, copies: int, out: Path) -> float:
    """Return the seconds of the processor for reading a file ``copies`` times and writing it once, in plain pieces."""
    started = time.process_time()
    with source.open("rb", buffering=0) as file, out.open("wb", buffering=0) as copy:
        while data := file.read(1 << 24):
            copy.write(data)
    for _ in range(copies - 1):
        with source.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    out.unlink()
    return time.process_time() - started


def operations(spec: PermutationSpec) -> int:
    """Return the operations of one gain matrix for each group; units of heads are compared in every pair of heads."""
    total = 0
    for name in spec.top_level():
        members = [g for g in spec.groups.values() if name in (g.name, g.within)]
        inside = [g.size for g in members if g.within]
        size = spec.groups[name].size * max(inside, default=1)
        for parameter, _ in {(x.parameter, x.dim) for g in members for x in g.axes}:
            total += 2 * size * torch.Size(spec.shapes[parameter]).numel()
    return total


def align(a: Path, b: Path, out: Path) -> dict[str, Any]:
    """Align once in this process, as the command does. Return times, memory and what was found."""
    ask_for_huge_pages()
    from fastmatch.checkpoint import align_checkpoints

    wall, started = time.perf_counter(), time.process_time()
    alignment = align_checkpoints(a, b, out)
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    memory, matching = peak(), alignment.matching
    assert matching is not None
    assert alignment.proof is not None
    spec = alignment.spec
    assert spec is not None
    moving = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    numbers = {name: torch.Size(shape).numel() for name, shape in spec.shapes.items()}
    rate, groups = product_rate(), len(spec.top_level())
    moved = operations(spec) * matching.solves / groups
    return {
        "gigabytes": a.stat().st_size / 1e9,
        "can move": sum(numbers[name] for name in moving) / sum(numbers.values()),
        "seconds": seconds, "wall": wall, "peak": memory / 1e9,
        "rate": rate / 1e9, "bound": transfer_seconds(b, 2, out.with_suffix(".copy")) + moved / rate,
        "groups": groups, "solves": matching.solves, "sweeps": matching.sweeps,
        "objective": [matching.objective[0], matching.objective[-1]], "units moved": alignment.moved,
        "proof": alignment.proof.error,
    }  # fmt: skip


def change_at_full_size(b: Path, out: Path) -> float:
    """Return the largest change of an output of the networks in a file, in float64."""
    from fastmatch.checkpoint import verify_checkpoints

    return verify_checkpoints(b, out).error


def recovered(a: Path, out: Path) -> bool:
    """Return whether every tensor is that of A with the noise that was added, to the last bit."""
    from fastmatch.checkpoint import Checkpoint

    first, result = Checkpoint(a), Checkpoint(out)
    return all(torch.equal(noisy(first, name, NOISE), result[name]) for name in first)


def child(*arguments: str) -> dict[str, Any]:
    """Run this module in another process and return what it prints last."""
    command = [sys.executable, "-m", f"bench.reports.{NAME}", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make(pair: str, shapes: dict[str, tuple[int, ...]], a: Path, b: Path) -> None:
    """Write B of a pair, and A if it is not there."""
    from fastmatch.checkpoint import Checkpoint
    from fastmatch.checkpoint.tracing import trace_checkpoint

    if not a.exists():
        write_random(a, shapes, seed=0)
    if pair == "random":
        write_random(b, shapes, seed=1)
    else:
        plant(a, b, trace_checkpoint(a, Checkpoint(a)), NOISE)


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    options.dir.mkdir(parents=True, exist_ok=True)
    a, b, out = (options.dir / f"{x}.safetensors" for x in ("a", "b", "out"))
    for name in options.models:
        components = ("vae",) if options.tiny else ()
        shapes = listed_shapes(FILES[name], *components)
        try:
            for pair in options.pairs:
                make(pair, shapes, a, b)
                row = child("--align", "--dir", str(options.dir))
                row["recovered"] = recovered(a, out) if pair == "planted" else None
                if name in WHOLE and not options.tiny:
                    row |= child("--verify", "--dir", str(options.dir))
                yield {"model": name, "pair": pair, **row}
                b.unlink()
                out.unlink()
        finally:
            for path in (a, b, out):
                path.unlink(missing_ok=True)


def measure(options: argparse.Namespace) -> record.Record:
    torch.set_num_threads(1)
    found = record.record(rows(options), packages=["diffusers", "sd-mecha", "safetensors"], noise=NOISE)
    return found if options.tiny else record.with_earlier(NAME, found, "model", "pair")


def page(found: record.Record) -> str:
    shown = [
        {
            "model": row["model"], "pair": row["pair"], "GB": f"{row['gigabytes']:.2f}",
            "parameters that can move": f"{row['can move']:.1%}", "groups": row["groups"], "assignments": row["solves"],
            "seconds": f"{row['seconds']:.0f}", "bound": f"{row['bound']:.0f}",
            "ratio": f"{row['seconds'] / row['bound']:.2f}", "peak GB": f"{row['peak']:.2f}",
            "objective": "{:.4g} to {:.4g}".format(*row["objective"]), "error of the proof": f"{row['proof']:.0e}",
            "change at full size": f"{row['change']:.0e}" if "change" in row else "not measured",
            "recovered": {True: "to the last bit", False: "no", None: "nothing planted"}[row["recovered"]],
        }
        for row in found["rows"]
    ]  # fmt: skip
    rates = ", ".join(f"{row['rate']:.0f}" for row in found["rows"])
    return record.page(
        "Stable Diffusion files of full size", NAME, found,
        *(" ".join(part.split()) for part in __doc__.split("\n\n")[2:]),
        f"Float32 products ran at {rates} GFLOP in a second of one thread, row by row.",
        record.table(shown),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-bench"), help="a folder for the files"
    )
    for option in ("--align", "--verify"):  # the measured processes
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    if "--align" in given or "--verify" in given:
        torch.set_num_threads(1)
        paths = [parser.parse_args(given).dir / f"{x}.safetensors" for x in ("a", "b", "out")]
        print(
            json.dumps(align(*paths) if "--align" in given else {"change": change_at_full_size(*paths[1:])})
        )
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
