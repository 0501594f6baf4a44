"""Alignment of synthetic Llama-shaped checkpoints on disk: peak memory, reads, and the time of each part.

    python -m bench.reports.checkpoint_alignment --gigabytes 12 --hidden 4096 --width 11008 --cosines 1 --dir /tmp/bench

The peak is VmHWM of a process that only aligns. Tensors are read into buffers and never mapped, so the figure has no page
cache in it, but everything that the process held, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.lib import record
from bench.lib.machine import peak
from fastmatch._internal.huge_pages import ask_for_huge_pages
from fastmatch_kernels.matrix_product import addmm_nt

NAME = "checkpoint_alignment"
ROOT = Path(__file__).parents[2]
HEADS, KV_HEADS = 32, 8


def config(hidden: int, layers: int, width: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip


def shards(hidden: int, layers: int, width: int, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes by name: embeddings, one shard per layer, head."""
    kv = hidden * KV_HEADS // HEADS
    result: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    for k in range(layers):
        p = f"model.layers.{k}."
        result.append({
            p + "self_attn.q_proj.weight": (hidden, hidden), p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden), p + "self_attn.o_proj.weight": (hidden, hidden),
            p + "mlp.gate_proj.weight": (width, hidden), p + "mlp.up_proj.weight": (width, hidden),
            p + "mlp.down_proj.weight": (hidden, width), p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
        })  # fmt: skip
    return [*result, {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}]


def random_bf16(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Return numbers of random signs and mantissas, with magnitudes from 1/2 to 1: as fast as random bits."""
    bits = generator.integers(0, 1 << 16, size=shape, dtype=np.uint16) & np.uint16(0x807F) | np.uint16(0x3F00)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def make(folder: Path, shape: tuple[int, int, int, int], seed: int) -> int:
    """Write the random checkpoint. Return its size in bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(*shape)))
    generator = np.random.default_rng(seed)
    listed = shards(*shape)
    weight_map, total = {}, 0
    for k, names in enumerate(listed):
        file = f"model-{k + 1:05d}-of-{len(listed):05d}.safetensors"
        tensors = {name: random_bf16(size, generator) for name, size in names.items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def chosen_groups(spec, count: int | None) -> list[str]:
    """Return the first ``count`` groups of MLPs, or every group."""
    names = [n for n in spec.groups if count is None or ".mlp." in n]
    return names[:count]


def plant(folder: Path, out: Path, groups: int | None, seed: int, cosine: float = 1.0) -> None:
    """Write a copy of the checkpoint with the chosen groups permuted at random.

    ``cosine`` is that of each matrix with the copy before it is permuted; 0 is an independent network.
    """
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.checkpoint.structure import bind
    from fastmatch.checkpoint.writer import write_like
    from fastmatch.permutations.apply import permute_tensor

    source = Checkpoint(folder)
    spec = bind(trace_config(folder), source.headers, str(folder))
    spec = spec.select(chosen_groups(spec, groups))
    permutations = spec.random(torch.Generator().manual_seed(seed))
    generator = np.random.default_rng(seed + 1)

    def moved(name: str) -> torch.Tensor:
        tensor = source[name]
        if cosine < 1:
            noise = random_bf16(tuple(tensor.shape), generator)
            tensor = (cosine * tensor).add_((1 - cosine**2) ** 0.5 * noise)
        return permute_tensor(tensor, name, spec, permutations)

    write_like(source, out, moved)


class Parts:
    """Processor seconds of this process by part. What a part calls that is a part itself counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    def time(self, owner: Any, attribute: str, part: str) -> None:
        """Time every call of a function or method from now on."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - started
                own = took - self._inner.pop()
                self.seconds[part] = self.seconds.get(part, 0.0) + own
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, attribute, timed)


def align(folder: Path, permuted: Path, out: Path, groups: int | None) -> dict[str, object]:
    """Align once in this process. Return the time of each part, what was read and the peak memory."""
    import fastmatch.checkpoint.align as out_of_core
    import fastmatch.checkpoint.pairs as pairs
    import fastmatch.matching.ascent as ascent
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.matching.gains import Gains
    from fastmatch.matching.objective import WeightObjective
    from fastmatch.matching.placement import Placement

    reads: dict[Path, list[int]] = {folder: [], permuted: []}
    read = Checkpoint._read

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        reads[self.path].append(tensor.nbytes)
        return tensor

    Checkpoint._read = counted  # type: ignore[method-assign]
    parts = Parts()
    parts.time(pairs, "survey", "survey: read, hash, sums")
    parts.time(Gains, "cost_of", "gains, as far as bounds require")
    parts.time(Placement, "placed", "gathering for the residual stream, inner products")
    parts.time(Placement, "gain_of", "gathering for the residual stream, inner products")
    parts.time(WeightObjective, "value", "objective")
    parts.time(WeightObjective, "change", "objective")
    parts.time(ascent, "match_nested", "heads")
    parts.time(ascent.Ascent, "_solved", "assignments and their proofs")
    parts.time(out_of_core, "write_like", "write")
    spec = trace_config(folder)
    started, processor = time.perf_counter(), time.process_time()
    alignment = out_of_core.align_checkpoints(
        folder, permuted, out, spec=spec.select(chosen_groups(spec, groups))
    )
    total, processor = time.perf_counter() - started, time.process_time() - processor
    memory = peak()  # before the comparison below
    Checkpoint._read = read  # type: ignore[method-assign]
    matching = alignment.matching
    assert matching is not None
    size = Checkpoint(folder).nbytes
    first, result = Checkpoint(folder), Checkpoint(out)
    return {
        "seconds": total, "processor s": processor, "parts": {**parts.seconds, "other": processor - sum(parts.seconds.values())},
        "peak": memory, "reads of A": sum(reads[folder]) / size, "reads of B": sum(reads[permuted]) / size,
        "equal to A": all(torch.equal(first[n], result[n]) for n in first), "groups": len(alignment.permutations),
        "of": len(spec.groups), "solves": matching.solves, "sweeps": matching.sweeps, "load": os.getloadavg()[0],
    }  # fmt: skip


def product_rates() -> dict[str, float]:
    """Return the operations per second of float32 products on the cores that torch uses: torch's own, and the engine's."""
    a, b, out = torch.randn(2048, 4096), torch.randn(2048, 4096), torch.empty(2048, 2048)
    products = {"torch.mm": lambda: torch.mm(a, b.T, out=out), "engine": lambda: addmm_nt(out, a, b, beta=0)}
    rates = {}
    for name, multiply in products.items():
        multiply()
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            multiply()
            taken.append(time.perf_counter() - started)
        rates[name] = 2 * 2048 * 2048 * 4096 / min(taken)
    return rates


def rows(options: argparse.Namespace, shape: tuple[int, int, int, int]) -> Iterator[record.Row]:
    """Yield the rows that are kept, then one for each cosine."""
    a, b, out = folders(options.dir)
    hidden, layers, width, vocabulary = shape
    network = f"hidden {hidden}, {layers} layers, MLP {width}, vocabulary {vocabulary}"
    if options.append:
        for row in record.read(NAME)["rows"]:
            if row["network"] != network or row["cosine"] not in options.cosines:
                yield row
    options.dir.mkdir(parents=True)
    try:
        size = make(a, shape, seed=0)
        for cosine in options.cosines:
            plant(a, b, options.groups, seed=1, cosine=cosine)
            command = [sys.executable, "-m", "bench.reports.checkpoint_alignment", "--align"]
            command += ["--dir", str(options.dir)]
            command += ["--groups", str(options.groups)] if options.groups is not None else []
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            products = 2 * (layers * 3 * hidden * width**2 + hidden * size // 2)
            yield {"network": network, "bytes": size, "cosine": cosine, "products": products, **found}
            shutil.rmtree(b)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(options.dir)


def measure(options: argparse.Namespace) -> record.Record:
    if options.tiny:
        options.gigabytes, options.hidden, options.width, options.vocabulary = 0.002, 128, 256, 512
    h, w, v = options.hidden, options.width, options.vocabulary
    layer = 2 * (h * h * 5 // 2 + 3 * h * w)
    layers = max(1, round((options.gigabytes * 1e9 - 4 * v * h) / layer))
    return record.record(rows(options, (h, layers, w, v)), packages=["safetensors"], rates=product_rates())


def page(found: record.Record) -> str:
    rates = found["settings"]["rates"]
    sections = []
    for network in dict.fromkeys(row["network"] for row in found["rows"]):
        chosen = [row for row in found["rows"] if row["network"] == network]
        table = [
            {
                "cosine": f"{row['cosine']:g}", "groups": f"{row['groups']} of {row['of']}", "sweeps": row["sweeps"],
                "solves": row["solves"], "seconds": row["seconds"], "processor s": row["processor s"], "reads of A": row["reads of A"],
                "reads of B": row["reads of B"], "peak, GB": row["peak"] / 1e9, "equal to A": row["equal to A"], "load": row["load"],
            }
            for row in chosen
        ]  # fmt: skip
        names = dict.fromkeys(name for row in chosen for name in row["parts"])
        parts = [
            {"processor s": name, **{f"{row['cosine']:g}": row["parts"].get(name, "-") for row in chosen}}
            for name in names
        ]
        products = chosen[0]["products"]
        sections += [
            f"## {chosen[0]['bytes'] / 1e9:.2f} GB: {network}",
            f"All products of all groups, once: {products / 1e12:.2f} TFLOP. That is {products / rates['torch.mm']:.0f} s at the rate of `torch.mm`, "
            f"{rates['torch.mm'] / 1e9:.0f} GFLOP/s, and {products / rates['engine']:.0f} s at that of the engine's own product, "
            f"{rates['engine'] / 1e9:.0f} GFLOP/s.",
            record.table(table),
            record.table(parts, form=".1f"),
        ]
    return record.page(
        "Streamed alignment of a Llama-shaped checkpoint", NAME, found,
        "Checkpoints in bfloat16 shards. B is A mixed with an independent checkpoint so that each tensor has the cosine of the table, then permuted: 1 is a "
        "sibling, 0 an unrelated network. Reads are the bytes read, in those of one checkpoint. The peak is VmHWM of the aligning process. "
        "Seconds depend on what else ran (load: the average at the end of the run); processor seconds count all threads. A part that was not timed by itself, -, "
        "is in the last one.",
        *sections,
    )  # fmt: skip


def folders(root: Path) -> tuple[Path, Path, Path]:
    return root / "a", root / "b", root / "out"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each of the two checkpoints")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the residual stream")
    parser.add_argument("--width", type=int, default=5504, help="units of an MLP")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument(
        "--cosines",
        type=float,
        nargs="+",
        default=[1.0, 0.999, 0.95, 0.7, 0.0],
        help="of A's and B's matrices",
    )
    parser.add_argument(
        "--groups", type=int, help="permute and match only so many MLPs; every group by default"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-bench"), help="a folder to make and remove"
    )
    parser.add_argument("--append", action="store_true", help="keep the rows of the committed record")
    parser.add_argument("--align", action="store_true", help=argparse.SUPPRESS)  # the measured process
    given = sys.argv[1:] if arguments is None else arguments
    if "--align" in given:
        ask_for_huge_pages()  # as the command does
        options = parser.parse_args(given)
        print(json.dumps(align(*folders(options.dir), options.groups)))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
