"""Alignment of a synthetic Llama-shaped checkpoint on disk: peak memory, and the time of each part.

    python -m bench.reports.checkpoint_alignment --gigabytes 12 --dir /tmp/bench

The peak is VmHWM of a process that only aligns. Tensors are read into buffers and never mapped, so the figure has no page
cache in it, but everything that the process held, libraries included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench.lib import record

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


def plant(folder: Path, out: Path, groups: int | None, seed: int) -> None:
    """Write a copy of the checkpoint with the chosen groups permuted at random."""
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.checkpoint.structure import bind
    from fastmatch.checkpoint.writer import write_like
    from fastmatch.permutations.apply import permute_tensor

    source = Checkpoint(folder)
    spec = bind(trace_config(folder), source.headers, str(folder))
    spec = spec.select(chosen_groups(spec, groups))
    permutations = spec.random(torch.Generator().manual_seed(seed))
    write_like(source, out, lambda n: permute_tensor(source[n], n, spec, permutations))


def peak() -> int:
    """Return the peak resident bytes of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def align(folder: Path, permuted: Path, out: Path, groups: int | None) -> dict[str, object]:
    """Align once in this process. Return the time of each part."""
    import fastmatch.checkpoint.align as out_of_core
    import fastmatch.matching.ascent as ascent
    from fastmatch.checkpoint import Checkpoint, trace_config

    seconds = {"assignment": 0.0, "write": 0.0}
    readers: list[Checkpoint] = []

    def timed(function, key):
        def wrapped(*args, **kwargs):
            before, started = sum(r.seconds for r in readers), time.perf_counter()
            result = function(*args, **kwargs)
            read = sum(r.seconds for r in readers) - before
            seconds[key] += time.perf_counter() - started - read
            return result

        return wrapped

    class Recorded(Checkpoint):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            readers.append(self)

    started = time.perf_counter()
    spec = trace_config(folder)
    traced = time.perf_counter() - started
    ascent.solve = timed(ascent.solve, "assignment")
    out_of_core.write_like = timed(out_of_core.write_like, "write")
    out_of_core.Checkpoint = Recorded
    started = time.perf_counter()
    alignment = out_of_core.align_checkpoints(
        folder, permuted, out, spec=spec.select(chosen_groups(spec, groups))
    )
    total = time.perf_counter() - started
    read = sum(r.seconds for r in readers)
    matching = alignment.matching
    assert matching is not None
    split = {"read": read, **seconds, "gains and checks": total - read - sum(seconds.values())}
    memory = peak()  # before the comparison below
    first, result = Checkpoint(folder), Checkpoint(out)
    equal = all(torch.equal(first[n], result[n]) for n in first)
    return {
        "trace": traced, "total": total, "split": split, "peak": memory, "recovered": equal,
        "groups": len(alignment.permutations), "of": len(spec.groups), "solves": matching.solves,
        "sweeps": matching.sweeps,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> record.Record:
    if options.tiny:
        options.gigabytes, options.hidden, options.width, options.vocabulary = 0.002, 128, 256, 512
    a, b, _ = folders(options.dir)
    h, w, v = options.hidden, options.width, options.vocabulary
    layer = 2 * (h * h * 5 // 2 + 3 * h * w)
    layers = max(1, round((options.gigabytes * 1e9 - 4 * v * h) / layer))
    options.dir.mkdir(parents=True)
    try:
        size = make(a, (h, layers, w, v), seed=0)
        plant(a, b, options.groups, seed=1)
        command = [
            sys.executable,
            "-m",
            "bench.reports.checkpoint_alignment",
            "--align",
            "--dir",
            str(options.dir),
        ]
        command += ["--groups", str(options.groups)] if options.groups is not None else []
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(options.dir)
    found = json.loads(done.stdout.splitlines()[-1])
    shape = {"hidden": h, "layers": layers, "MLP": w, "vocabulary": v}
    return record.record([found], packages=["safetensors"], bytes=size, shape=shape)


def page(found: record.Record) -> str:
    settings, (row,) = found["settings"], found["rows"]
    shape = settings["shape"]
    seconds = {"trace": row["trace"], **row["split"], "total without trace": row["total"]}
    return record.page(
        "Streamed alignment of a Llama-shaped checkpoint", NAME, found,
        f"{settings['bytes'] / 1e9:.2f} GB per checkpoint, in bfloat16 shards: hidden {shape['hidden']}, {shape['layers']} layers, "
        f"MLP {shape['MLP']}, vocabulary {shape['vocabulary']}. {row['groups']} of {row['of']} groups were permuted and matched: "
        f"{row['solves']} assignments in {row['sweeps']} sweeps. Output equal to A: {row['recovered']}.",
        f"Peak resident memory (VmHWM of the aligning process): {row['peak'] / 1e9:.2f} GB.",
        record.table([{"part": name, "seconds": value} for name, value in seconds.items()], form=".1f"),
    )  # fmt: skip


def folders(root: Path) -> tuple[Path, Path, Path]:
    return root / "a", root / "b", root / "out"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each of the two checkpoints")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the residual stream")
    parser.add_argument("--width", type=int, default=5504, help="units of an MLP")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument(
        "--groups", type=int, help="permute and match only so many MLPs; every group by default"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/fastmatch-bench"), help="a folder to make and remove"
    )
    parser.add_argument("--align", action="store_true", help=argparse.SUPPRESS)  # the measured process
    given = sys.argv[1:] if arguments is None else arguments
    if "--align" in given:
        options = parser.parse_args(given)
        print(json.dumps(align(*folders(options.dir), options.groups)))
        return 0
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
