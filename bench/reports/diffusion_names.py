"""Diffusion models by the names and shapes in their files: found, traced and proved at full size without a weight.

    python -m bench.reports.diffusion_names

Each model is traced in a process of its own, with one thread; seconds are of the processor, because other work shares the machine. The
peak is that of the whole process, libraries included. The proof runs a reduced model with the same names, layers and heads in
float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench.lib import record
from bench.lib.diffusion_shapes import FAMILIES, UNets, shapes_of, unet_shapes
from bench.lib.machine import peak

NAME = "diffusion_names"
ROOT = Path(__file__).parents[2]


def trace(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Trace and prove a file in this process."""
    from fastmatch.checkpoint.diffusion.components import find_components
    from fastmatch.checkpoint.diffusion.single_file import prove_file, trace_file

    import_started = time.process_time()
    import diffusers  # noqa: F401 - so that its import is not counted
    import transformers  # noqa: F401

    libraries = time.process_time() - import_started
    started = time.process_time()
    spec = trace_file(shapes, "file")
    traced, memory = time.process_time() - started, peak() / 1e9
    started = time.process_time()
    proof = prove_file(shapes, spec, "file")
    proved = time.process_time() - started
    moving = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    numbers = {name: prod(shape) for name, shape in spec.shapes.items()}
    return {
        "networks": [component.kind.role for component in find_components(shapes, "file")],
        "tensors": len(shapes), "billions": sum(map(prod, shapes.values())) / 1e9,
        "can move": sum(numbers[name] for name in moving) / sum(numbers.values()), "groups": len(spec.top_level()),
        "imports": libraries, "trace": traced, "peak": memory, "prove": proved, "error": proof.error,
    }  # fmt: skip


TINY = UNets((0, 1), 1, 32, channels=64, multiples=(1, 2))


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    if options.tiny:
        shapes = {f"model.diffusion_model.{name}": shape for name, shape in unet_shapes(TINY).items()}
        yield {"model": "tiny", **trace(shapes)}
        return

    def child(model: str) -> record.Row:
        command = [sys.executable, "-m", f"bench.reports.{NAME}", "--trace", "--models", model]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return {"model": model, **json.loads(done.stdout.splitlines()[-1])}

    with ThreadPoolExecutor(options.jobs) as pool:
        yield from pool.map(child, options.models)


def measure(options: argparse.Namespace) -> record.Record:
    return record.record(rows(options), packages=["diffusers", "transformers", "sd-mecha"])


def page(found: record.Record) -> str:
    shown = [
        {
            "model": row["model"], "networks": ", ".join(row["networks"]), "tensors": row["tensors"],
            "parameters, billions": f"{row['billions']:.2f}", "can move": f"{row['can move']:.1%}", "groups": row["groups"],
            "trace, seconds": f"{row['trace']:.1f}", "peak, GB": f"{row['peak']:.2f}", "proof, seconds": f"{row['prove']:.1f}",
            "error": f"{row['error']:.0e}",
        }
        for row in found["rows"]
    ]  # fmt: skip
    return record.page(
        "Diffusion models by names and shapes", NAME, found, " ".join(__doc__.split("\n\n")[2].split()),
        "Seconds do not include the imports of diffusers and transformers, which take "
        f"{max(row['imports'] for row in found['rows']):.0f} at most.",
        record.table(shown),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)  # the measured process
    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    if "--trace" in given:
        print(json.dumps(trace(shapes_of(parser.parse_args(given).models[0]))))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
