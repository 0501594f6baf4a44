"""Seventy checkpoints of a reduced SDXL in one: time and memory by the number of files, and a run that is killed.

    python -m bench.reports.diffusion_many --dir /tmp/bench

Files of random numbers have the names of SDXL's UNet with a fifth of its width and fewer layers. Each is the first one with noise of a
tenth of each tensor's standard deviation, permuted at random. All are aligned to the first and merged into one file, in a process of
its own with one thread; seconds are of the processor. Another run is killed in the middle and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.lib import record
from bench.lib.diffusion_files import plant, write_random
from bench.lib.diffusion_shapes import SDXL, unet_shapes
from bench.lib.machine import peak

NAME = "diffusion_many"
ROOT = Path(__file__).parents[2]
REDUCED = replace(SDXL, channels=64, depths=(0, 1, 1), middle=1)
COUNTS = (10, 30, 70)
NOISE = 0.1


def files(folder: Path, count: int) -> list[Path]:
    return [folder / f"{k:02}.safetensors" for k in range(count)]


def make(folder: Path, count: int) -> None:
    """Write the files."""
    from fastmatch.checkpoint.diffusion.single_file import trace_file

    shapes = {f"model.diffusion_model.{name}": shape for name, shape in unet_shapes(REDUCED).items()}
    spec = trace_file(shapes, "SDXL")
    folder.mkdir(parents=True)
    first, *others = files(folder, count)
    write_random(first, shapes, seed=0)
    for k, path in enumerate(others, start=1):
        plant(first, path, spec, NOISE, seed=k)


def merge(folder: Path, count: int, out: Path, *, resume: bool) -> dict[str, Any]:
    """Align and merge ``count`` files in this process. Return the cost."""
    from fastmatch.checkpoint import MergeOptions, align_many_checkpoints

    started = time.process_time()
    align_many_checkpoints(
        files(folder, count), out, merge=MergeOptions([1 / count] * count), resume=resume, progress=False
    )
    seconds = time.process_time() - started
    return {"files": count, "seconds": seconds, "peak": peak() / 1e9}


def command(folder: Path, count: int, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", f"bench.reports.{NAME}", "--merge", str(out), "--dir", str(folder), "--count", str(count),
        *more,
    ]  # fmt: skip


def killed(folder: Path, count: int, out: Path) -> int:
    """Kill a run when half of its matches are finished. Return how many it kept."""
    process = subprocess.Popen(command(folder, count, out), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        kept = len(list(out.parent.glob(f".{out.name}*/*.safetensors")))
        if kept >= count // 2:
            process.kill()
            process.wait()
            return kept
        time.sleep(0.05)
    raise RuntimeError("the run ended before half of its matches were seen")


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    counts = (3, 5) if options.tiny else options.counts
    folder, out = options.dir / "files", options.dir / "out.safetensors"
    digests: dict[int, str] = {}
    try:
        make(folder, max(counts))
        subprocess.run(command(folder, 2, out), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)  # compiles
        out.unlink()
        for count in counts:
            done = subprocess.run(
                command(folder, count, out), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            )
            digests[count] = hashlib.sha256(out.read_bytes()).hexdigest()
            out.unlink()
            yield json.loads(done.stdout.splitlines()[-1]) | {"run": "at once"}
        if len(counts) == 1:
            return
        count = counts[1]
        kept = killed(folder, count, out)
        done = subprocess.run(
            command(folder, count, out, "--resume"), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
        )
        equal = hashlib.sha256(out.read_bytes()).hexdigest() == digests[count]
        again = json.loads(done.stdout.splitlines()[-1])
        yield again | {
            "run": f"killed after {kept} matches, then resumed: {'equal bits' if equal else 'OTHER BITS'}"
        }
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)


def measure(options: argparse.Namespace) -> record.Record:
    found = record.record(rows(options), packages=["diffusers", "safetensors"])
    if not options.tiny:
        found = record.with_earlier(NAME, found, "files", "run")
        found["rows"].sort(key=lambda row: (row["run"] != "at once", row["files"]))
    return found


def page(found: record.Record) -> str:
    first, *_ = found["rows"]
    shown = [
        {
            "files": row["files"], "run": row["run"], "seconds": f"{row['seconds']:.0f}",
            "seconds a file": f"{row['seconds'] / row['files']:.2f}", "peak, GB": f"{row['peak']:.3f}",
            f"peak, of that for {first['files']}": f"{row['peak'] / first['peak']:.2f}",
        }
        for row in found["rows"]
    ]  # fmt: skip
    text = " ".join(__doc__.split("\n\n")[2].split())
    return record.page("Seventy checkpoints in one", NAME, found, text, record.table(shown))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-many"), help="a folder to make and remove"
    )
    parser.add_argument(
        "--counts",
        nargs="+",
        type=int,
        default=list(COUNTS),
        help="numbers of files; the second is also for a run that is killed",
    )
    for option in ("--merge", "--count", "--resume"):  # the measured process
        parser.add_argument(
            option, help=argparse.SUPPRESS, **({"action": "store_true"} if option == "--resume" else {})
        )
    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    if "--merge" in given:
        options = parser.parse_args(given)
        print(json.dumps(merge(options.dir, int(options.count), Path(options.merge), resume=options.resume)))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
