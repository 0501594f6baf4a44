"""Alignment of a Llama-shaped checkpoint on disk by several ranks: seconds, and what the cost model says of them.

    python -m bench.reports.several_processes --dir /tmp/bench

Each rank computes with one thread. The rates of the model are those of short measurements of one tensor and one group, made just
before the runs, not fitted to them. A and B are unrelated networks, because the model does not know how much bounds spare.
Runs of different numbers of ranks alternate, because the load of a shared machine changes; the page has the fastest of each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.lib import record
from bench.reports.checkpoint_alignment import make

NAME = "several_processes"
ROOT = Path(__file__).parents[2]
WITHIN = 0.3
"""The fraction of the measured time within which a prediction counts as right."""


def align(folder: Path, *, residual: bool) -> dict[str, Any] | None:
    """Align in this process, one of the ranks; rank 0 returns what the run took."""
    from fastmatch._internal.ranks import joined
    from fastmatch.checkpoint import align_checkpoints, trace_config

    torch.set_num_threads(1)
    with joined() as ranks:
        spec = trace_config(folder / "a")
        spec = spec if residual else spec.without_residual()
        ranks.exchange(None, "the start")
        started, before = time.perf_counter(), time.process_time()
        found = align_checkpoints(folder / "a", folder / "b", folder / "out", spec=spec, progress=False)
        seconds = time.perf_counter() - started
        processor = ranks.exchange(time.process_time() - before, "the end of the run")
    matching = found.matching
    assert matching is not None
    if ranks.rank:
        return None
    return {
        "seconds": seconds, "processor s": sum(processor), "busiest": max(processor), "sweeps": matching.sweeps,
        "solves": matching.solves, "objective": matching.objective[-1], "parts": found.seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def rates(folder: Path) -> dict[str, float]:
    """Return the rates of one rank, from one tensor of an MLP and the assignment of its group."""
    from fastmatch import solve
    from fastmatch._internal.safetensors_file import write_safetensors
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.checkpoint.prediction import DEVICES
    from fastmatch.checkpoint.structure import bind
    from fastmatch.checkpoint.survey import _of_tensor
    from fastmatch.matching.gains import Gains
    from fastmatch.matching.objective import WeightObjective
    from fastmatch.spec import PermutationSpec

    torch.set_num_threads(1)
    a, b = Checkpoint(folder / "a"), Checkpoint(folder / "b")
    name = "model.layers.0.mlp.down_proj.weight"
    x, y = a[name].float(), b[name].float()
    gain = x.T @ y
    target = folder / "one.safetensors"
    spec = bind(trace_config(folder / "a"), a.headers, "a")
    group = spec.groups[next(g for axis, g in spec.axes_of(name) if axis.dim == 1)]
    names = [axis.parameter for axis in group.axes]
    near = {g for n in names for _, g in spec.axes_of(n)}
    groups = {
        g: replace(spec.groups[g], axes=tuple(x for x in spec.groups[g].axes if x.parameter in names))
        for g in near
    }
    part = PermutationSpec(groups, {n: spec.shapes[n] for n in names})
    states = [{n: checkpoint[n] for n in names} for checkpoint in (a, b)]
    problem, gains = WeightObjective(*states, part, "affine"), Gains(*states, part, 0)
    still, moved = part.identity(), part.random()

    def gather() -> None:
        for _ in gains.pairs(group, group.axes, moved):
            pass
        problem.change({group.name: moved[group.name]}, still)

    def write() -> None:
        write_safetensors(target, target, {name: a.headers[name]}, lambda _: a[name], {})
        with target.open("rb") as file:
            os.fsync(file.fileno())

    size, found = a.headers[name].nbytes, asdict(DEVICES["cpu"])
    found["survey"] = 2 * size / fastest(lambda: _of_tensor(a, b, name))
    found["read"] = size / fastest(lambda: a[name])
    found["products"] = 2.0 * len(gain) * x.numel() / fastest(lambda: x.T @ y)
    found["gather"] = 2 * sum(a[n].nbytes for n in names) / fastest(gather)
    found["assignment"] = gain.numel() / fastest(lambda: solve(gain, maximize=True))
    found["write"] = size / fastest(write)
    target.unlink()
    return found


def fastest(call: Callable[[], object], times: int = 5) -> float:
    """Return the least processor seconds of a call, after one that is not counted; no other program is in them."""
    call()
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return max(min(taken), 1e-6)


def predicted(
    folder: Path, device: dict[str, float], ranks: int, found: dict[str, Any], *, residual: bool
) -> dict[str, float]:
    """Return what the model says of a run, by part; it is told how often the run solved its groups."""
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.checkpoint.prediction import Device, predict, work_of
    from fastmatch.checkpoint.structure import bind

    b = Checkpoint(folder / "b")
    spec = bind(trace_config(folder / "b"), b.headers, "b")
    spec = spec if residual else spec.without_residual()
    files = [float(sum(b.headers[name].nbytes for name in b.names_in(file))) for file in b.files]
    sweeps = max(1, round(found["solves"] / len(spec.top_level())))
    return predict(work_of(b, spec, files), Device(**device), ranks, sweeps).seconds


def run(folder: Path, ranks: int, *, residual: bool) -> dict[str, Any]:
    """Align with a number of ranks and return what rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.rmtree(folder / "out", ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [
        sys.executable,
        "-m",
        f"bench.reports.{NAME}",
        "--dir",
        str(folder),
        "--rank",
        "move" if residual else "hold",
    ]
    load = os.getloadavg()[0]
    started = [
        subprocess.Popen(
            command, env=environment | ({"RANK": str(rank)} if ranks > 1 else {}), cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a rank failed")
    return {"load": load, **json.loads(said[0].splitlines()[-1])}


def rows(options: argparse.Namespace, device: dict[str, float]) -> Iterator[record.Row]:
    """Yield a row for each run."""
    for turn in range(options.times):
        for residual in (True, False):
            for ranks in options.ranks:
                found = run(options.dir, ranks, residual=residual)
                said = predicted(options.dir, device, ranks, found, residual=residual)
                yield {
                    "ranks": ranks,
                    "residual": "moved" if residual else "held",
                    "turn": turn,
                    "predicted": said,
                    **found,
                }


def measure(options: argparse.Namespace) -> record.Record:
    if options.tiny:
        options.hidden, options.layers, options.width, options.vocabulary, options.times = 64, 2, 96, 100, 1
    shape = (options.hidden, options.layers, options.width, options.vocabulary)
    options.dir.mkdir(parents=True)
    try:
        size = make(options.dir / "a", shape, seed=0)
        make(options.dir / "b", shape, seed=1)
        device = rates(options.dir)
        return record.record(
            rows(options, device), packages=["safetensors"], shape=shape, bytes=size, rates=device
        )
    finally:
        shutil.rmtree(options.dir)


def page(found: record.Record) -> str:
    settings = found["settings"]
    kinds = dict.fromkeys((row["ranks"], row["residual"]) for row in found["rows"])
    best = [
        min((r for r in found["rows"] if (r["ranks"], r["residual"]) == kind), key=lambda r: r["seconds"])
        for kind in kinds
    ]
    one = {row["residual"]: row for row in best if row["ranks"] == 1}
    table, parts = [], []
    for row in best:
        said = sum(row["predicted"].values())
        table.append({
            "ranks": row["ranks"], "residual stream": row["residual"], "seconds": row["seconds"], "predicted s": said,
            "predicted / measured": said / row["seconds"],
                "predicted / busiest rank": said / row["busiest"], "times faster": one[row["residual"]]["seconds"] / row["seconds"],
            "processor s": row["processor s"], "busiest rank": row["busiest"], "solves": row["solves"], "peak, GB": row["peak"] / 1e9,
            "same objective": row["objective"] == one[row["residual"]]["objective"], "load": row["load"],
        })  # fmt: skip
        measured = {f"measured {part}": seconds for part, seconds in row["parts"].items()}
        parts.append(
            {"ranks": row["ranks"], "residual stream": row["residual"], **measured, **row["predicted"]}
        )
    right = sum(abs(row["predicted / measured"] - 1) <= WITHIN for row in table)
    hidden, layers, width, words = settings["shape"]
    listed = ", ".join(f"{name} {value:.3g}" for name, value in settings["rates"].items())
    return record.page(
        "Alignment by several processes", NAME, found,
        f"A Llama of {layers} layers, {hidden} units, MLPs of {width}, {words} words: {settings['bytes'] / 1e9:.2f} GB in bfloat16 for each of A and B, "
        f"which are unrelated. One thread a rank. {right} of {len(table)} predictions are within {WITHIN:.0%} of the measured time. The model's rates "
        f"were measured on one tensor and one group before the runs: {listed} (bytes, operations or entries a second; seconds). A processor that "
        "other programs use makes a run slower than predicted (load: average before the run). The busiest rank's processor seconds have no such "
        "delay, and no wait for the disk or for another rank.",
        record.table(table),
        "Seconds by part: what the run measured, and after that what the model says.",
        record.table(parts, form=".2f"),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--hidden", type=int, default=1024, help="width of the residual stream, a multiple of 32"
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2816, help="units of an MLP")
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, 1 first")
    parser.add_argument("--times", type=int, default=3, help="runs of each kind")
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-ranks"), help="a folder to make and remove"
    )
    parser.add_argument("--rank", choices=("move", "hold"), help=argparse.SUPPRESS)  # a process of a run
    given = sys.argv[1:] if arguments is None else arguments
    if "--rank" in given:
        options = parser.parse_args(given)
        print(json.dumps(align(options.dir, residual=options.rank == "move")))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
