"""Alignment of Stable Diffusion files beside sd-mecha's ``rebasin`` and the published loop with its public specification.

    python -m bench.reports.diffusion_peers --dir /tmp/bench --script merge_PermSpec_SD1UNet.py

A and B are files of random numbers with the names and sizes of real ones, in float16. Random pairs have nothing in common; siblings differ by noise
of a tenth of each tensor's standard deviation, as models do that were fine-tuned from one. sd-mecha's own
``rebasin`` aligns SDXL in float32. SD 1.5 is aligned by our plain port of the published loop (weight matching in torch and float32), with
the specification that ``--script`` defines, a file of ogkalu2's repository. Each run has a process of its own with one thread; seconds are of
the processor. sd-mecha iterates until nothing moves, at most 10 times. The published loop runs fewer iterations than its 3: what it takes
for these is its time, with that in iterations scaled, which is more than it takes if it converges before.

"Objective" is the inner product of all of A with all of the result. "Function" is the largest relative change: of the output of an attention
layer in the UNet of SDXL, where the streams keep their order; of the UNet's output for SD 1.5; of a reduced model's, in float64, where
the streams of SDXL move. Where it changes, units were moved across heads or apart from others, so that no alignment reaches that objective.
"Survey, match, write": the parts of ours. Survey reads, checks and hashes both files; what is left is imports, the structure, and the proof by reduced
models in float64. Ours asks torch for huge pages, as the command does; the others run as they come. "GFLOP in a second" are those of float32 products in the same process: rows of one model and pair are of one machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.lib import record
from bench.lib.diffusion_files import write_random, write_sibling
from bench.lib.diffusion_shapes import listed_shapes
from bench.lib.machine import peak, product_rate
from fastmatch._internal.huge_pages import ask_for_huge_pages
from fastmatch.checkpoint import Checkpoint

NAME = "diffusion_peers"
ROOT = Path(__file__).parents[2]
PAIRS = ("random", "siblings")
NOISE = 0.1
UNET = "model.diffusion_model."
HEAD, TOKENS = 64, 16
PUBLISHED_ITERATIONS = 3
"""Iterations of the published loop, unless it is told otherwise."""


def sd_mecha_run(a: Path, b: Path, out: Path) -> int:
    """Run sd-mecha's own ``rebasin`` with its own number of iterations. Return how many it took until nothing moved."""
    import sd_mecha
    from sd_mecha.extensions.builtin.merge_methods.rebasin import sdxl_sgm

    updates: Counter[int] = Counter()
    update = sdxl_sgm._update_one_pid

    def counted(closure: Any, pid: int, *others: Any) -> Any:
        updates[pid] += 1
        return update(closure, pid, *others)

    sdxl_sgm._update_one_pid = counted
    recipe = sd_mecha.rebasin(sd_mecha.model(b), sd_mecha.model(a))
    sd_mecha.merge(
        recipe,
        merge_dtype=torch.float32,
        output_dtype=torch.float16,
        threads=1,
        output=out,
        check_finite_output=False,
    )
    return max(updates.values())


def published_run(a: Path, b: Path, out: Path, iterations: int, script: Path) -> float:
    """Run the published loop with the specification of a script. Return the seconds in iterations."""
    from bench.lib.published import weight_matching_torch
    from fastmatch.backends.git_rebasin import spec_of
    from fastmatch.checkpoint.writer import write_like
    from fastmatch.permutations.apply import permute_tensor

    sys.path.insert(0, str(script.parent))
    found = importlib.util.spec_from_file_location("script", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    table = module.sdunet_permutation_spec().perm_to_axes
    checkpoint = Checkpoint(b)
    for group in list(table):
        table[group] = [(name, dim) for name, dim in table[group] if name in checkpoint]
        if not table[group]:
            del table[group]
    spec = spec_of(
        module.permutation_spec_from_axes_to_perm({})._replace(perm_to_axes=table), checkpoint.headers
    )
    names = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    states = [{name: Checkpoint(path)[name].float() for name in names} for path in (a, b)]
    started = time.process_time()
    permutations = weight_matching_torch(*states, spec, seed=0, max_sweeps=iterations)
    spent = time.process_time() - started
    write_like(checkpoint, out, lambda name: permute_tensor(checkpoint[name], name, spec, permutations))
    return spent


def ours_run(a: Path, b: Path, out: Path, *, streams: bool) -> dict[str, Any]:
    """Align by fastmatch as its command does: everything that can move, or all but the residual streams."""
    ask_for_huge_pages()
    from fastmatch._internal import stopwatch
    from fastmatch.checkpoint import align_checkpoints
    from fastmatch.checkpoint.tracing import trace_checkpoint

    # The parts in seconds of the processor, as the whole: other work may share the machine.
    setattr(stopwatch, "time", SimpleNamespace(perf_counter=time.process_time))  # noqa: B010 - a type of its own
    spec = None if streams else trace_checkpoint(b, Checkpoint(b)).without_residual()
    alignment = align_checkpoints(a, b, out, spec=spec)
    assert alignment.matching is not None
    proof = None if alignment.proof is None else alignment.proof.error
    return {"iterations": alignment.matching.sweeps, "proof": proof, "parts": alignment.seconds}


def objective(a: Path, out: Path) -> float:
    """Return the inner product of two files, in float64."""
    first, second = Checkpoint(a), Checkpoint(out)
    return sum(float(torch.dot(first[n].double().reshape(-1), second[n].double().reshape(-1))) for n in first)


def attention_change(b: Path, out: Path) -> float:
    """Return the largest relative change of the output of an attention layer in the UNet, for the same random input."""
    first, second = Checkpoint(b), Checkpoint(out)
    worst = 0.0
    for name in first:
        if not name.endswith(".to_q.weight") or not name.startswith(UNET):
            continue
        layer = name.removesuffix("to_q.weight")
        width, context = first.headers[name].shape[1], first.headers[layer + "to_k.weight"].shape[1]
        x, y = (torch.randn(TOKENS, n, generator=torch.Generator().manual_seed(n)) for n in (width, context))
        old, new = (_attention(checkpoint, layer, x, y) for checkpoint in (first, second))
        worst = max(worst, float((new - old).norm() / old.norm()))
    return worst


def _attention(checkpoint: Checkpoint, layer: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        (source @ checkpoint[f"{layer}to_{part}.weight"].float().T).unflatten(1, (-1, HEAD)).transpose(0, 1)
        for part, source in (("q", x), ("k", y), ("v", y))
    )
    mixed = torch.softmax(q @ k.transpose(1, 2) * HEAD**-0.5, dim=-1) @ v
    return mixed.transpose(0, 1).flatten(1) @ checkpoint[layer + "to_out.0.weight"].float().T


def unet_change(b: Path, out: Path) -> float:
    """Return the largest change of the UNet's output, relative to the largest entry, in float32."""
    from fastmatch.checkpoint.diffusion.components import find_components
    from fastmatch.checkpoint.diffusion.single_file import FileModel

    shapes = {n: tuple(t.shape) for n, t in Checkpoint(b).headers.items() if n.startswith(UNET)}
    outputs = []
    for path in (b, out):
        checkpoint = Checkpoint(path)
        model = FileModel(find_components(shapes, str(path)), shapes, hollow=False)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(checkpoint[name])
        with torch.no_grad():
            outputs.append(model(*model.examples)[0][0])
        del model
    old, new = outputs
    return float((new - old).abs().max() / old.abs().max())


def measured(kind: str, model: str, folder: Path, iterations: int, script: Path | None) -> record.Row:
    """Run one of the methods in this process and return its row."""
    a, b, out = (folder / f"{x}.safetensors" for x in ("a", "b", "out"))
    started, spent, proof = time.process_time(), 0.0, None
    parts: dict[str, float] = {}
    if kind == "sd-mecha":
        iterations = sd_mecha_run(a, b, out)
    elif kind == "published loop":
        assert script is not None
        spent = published_run(a, b, out, iterations, script)
    else:
        found = ours_run(a, b, out, streams=kind == "ours, everything")
        iterations, proof, parts = found["iterations"], found["proof"], found["parts"]
    seconds = time.process_time() - started
    memory = peak() / 1e9
    scaled = seconds + spent * (PUBLISHED_ITERATIONS / iterations - 1)
    if model == "SDXL":
        change = proof if kind == "ours, everything" else attention_change(b, out)
    else:
        change = unet_change(b, out)
    return {
        "model": model, "method": kind, "iterations": iterations, "seconds": seconds, "by default": scaled,
        "peak": memory, "rate": product_rate() / 1e9, "objective": objective(a, out), "function": change, "parts": parts,
    }  # fmt: skip


METHODS = {
    "SDXL": ("sd-mecha", "ours, same kind of groups", "ours, everything"),
    "SD 1.5": ("published loop", "ours, everything"),
}
EVERY_METHOD = tuple(dict.fromkeys(kind for kinds in METHODS.values() for kind in kinds))
CONFIGS = {"SDXL": "sdxl-sgm", "SD 1.5": "sd1-ldm"}


def rows(options: argparse.Namespace) -> Iterator[record.Row]:
    options.dir.mkdir(parents=True, exist_ok=True)
    a, b, out = (options.dir / f"{x}.safetensors" for x in ("a", "b", "out"))
    for model, pair in product(options.models, options.pairs):
        try:
            write_random(a, listed_shapes(CONFIGS[model]), seed=0)
            if pair == "random":
                write_random(b, listed_shapes(CONFIGS[model]), seed=1)
            else:
                write_sibling(a, b, NOISE)
            for kind in METHODS[model]:
                if kind not in options.methods or (kind == "published loop" and options.script is None):
                    continue
                command = [
                    sys.executable, "-m", f"bench.reports.{NAME}", "--method", kind, "--models", model, "--dir", str(options.dir),
                    "--iterations", str(options.iterations),
                ]  # fmt: skip
                command += ["--script", str(options.script)] if options.script else []
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                yield {"pair": pair, **json.loads(done.stdout.splitlines()[-1])}
                out.unlink()
        finally:
            for path in (a, b, out):
                path.unlink(missing_ok=True)


def measure(options: argparse.Namespace) -> record.Record:
    found = record.record(rows(options), packages=["diffusers", "sd-mecha"])
    return record.with_earlier(NAME, found, "model", "pair", "method")


def page(found: record.Record) -> str:
    shown = [
        {
            "model": row["model"], "pair": row["pair"], "method": row["method"], "iterations": row["iterations"], "seconds": f"{row['seconds']:.0f}",
            "of which survey, match, write": _parts(row), "seconds for the default iterations": f"{row['by default']:.0f}", "peak, GB": f"{row['peak']:.2f}",
            "objective": f"{row['objective']:.6g}", "function": f"{row['function']:.1e}",
            "GFLOP in a second": f"{row['rate']:.0f}" if "rate" in row else "not recorded",
        }
        for row in found["rows"]
    ]  # fmt: skip
    texts = [" ".join(part.split()) for part in __doc__.split("\n\n")[2:]]
    return record.page("Stable Diffusion beside other programs", NAME, found, *texts, record.table(shown))


def _parts(row: record.Row) -> str:
    """Return the seconds of our parts; what is left is imports, the structure, and the proof by reduced models."""
    return ", ".join(f"{seconds:.0f}" for seconds in row.get("parts", {}).values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=EVERY_METHOD, default=list(EVERY_METHOD))
    parser.add_argument("--iterations", type=int, default=1, help="of the published loop")
    parser.add_argument(
        "--script",
        type=Path,
        help="the file that defines sdunet_permutation_spec; SD 1.5 has no peer without it",
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-bench"), help="a folder for the files"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)  # the measured process
    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    if "--method" in given:
        options = parser.parse_args(given)
        row = measured(options.method, options.models[0], options.dir, options.iterations, options.script)
        print(json.dumps(row))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
