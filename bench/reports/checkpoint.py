"""Alignment of a synthetic Llama-shaped checkpoint on disk: peak memory and where the time goes.

    python -m bench.reports.checkpoint --gigabytes 12 --dir /tmp/bench --out bench/results/checkpoint.md

The peak is VmHWM of a process of its own that only aligns. Tensors are read with plain reads into buffers, never
mapped, so the figure counts no page cache but all that the process held, libraries too.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HEADS, KV_HEADS = 32, 8


def config(hidden: int, layers: int, width: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": vocabulary, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }  # fmt: skip


def shards(hidden: int, layers: int, width: int, vocabulary: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes by name: embeddings, one shard a layer, head."""
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
    """Random signs and mantissas, magnitudes from 1/2 to 1: as fast as random bits are."""
    bits = generator.integers(0, 1 << 16, size=shape, dtype=np.uint16) & np.uint16(0x807F) | np.uint16(0x3F00)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def make(folder: Path, shape: tuple[int, int, int, int], seed: int) -> int:
    """Writes the random checkpoint; its bytes."""
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


def chosen(spec, count: int | None) -> list[str]:
    """The first ``count`` groups of MLPs, or every group."""
    names = [n for n in spec.groups if count is None or ".mlp." in n]
    return names[:count]


def plant(folder: Path, out: Path, groups: int | None, seed: int) -> None:
    """Writes the sibling: the chosen groups permuted at random."""
    from fastmatch.checkpoint import Checkpoint, trace_config
    from fastmatch.checkpoint.structure import bind
    from fastmatch.checkpoint.writer import write_like
    from fastmatch.permutations.apply import permute_tensor

    source = Checkpoint(folder)
    spec = bind(trace_config(folder), source.headers, str(folder))
    spec = spec.select(chosen(spec, groups))
    permutations = spec.random(torch.Generator().manual_seed(seed))
    write_like(source, out, lambda n: permute_tensor(source[n], n, spec, permutations))


def peak() -> int:
    """Peak resident bytes of this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def measure(folder: Path, sibling: Path, out: Path, groups: int | None) -> dict[str, object]:
    """One alignment in this process, with the time of each part."""
    import fastmatch.checkpoint.align as streamed
    import fastmatch.matching.weights as weights
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

    class Noted(Checkpoint):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            readers.append(self)

    started = time.perf_counter()
    spec = trace_config(folder)
    traced = time.perf_counter() - started
    weights.solve = timed(weights.solve, "assignment")
    streamed.write_like = timed(streamed.write_like, "write")
    streamed.Checkpoint = Noted
    started = time.perf_counter()
    alignment = streamed.align_checkpoints(folder, sibling, out, spec=spec, groups=chosen(spec, groups))
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


def report(found: dict, size: int, shape: tuple[int, int, int, int]) -> str:
    rows = {"trace": found["trace"], **found["split"], "total without trace": found["total"]}
    return "\n".join([
        "# Streamed alignment of a Llama-shaped checkpoint", "",
        f"{size / 1e9:.2f} GB a checkpoint in bfloat16 shards: hidden {shape[0]}, {shape[1]} layers, MLP {shape[2]}, "
        f"vocabulary {shape[3]}. {found['groups']} of {found['of']} groups planted and matched: "
        f"{found['solves']} assignments in {found['sweeps']} sweeps; output equal to A: {found['recovered']}.", "",
        f"Peak resident memory (VmHWM of the aligning process): {found['peak'] / 1e9:.2f} GB.", "",
        "| part | seconds |", "|---|---:|",
        *(f"| {name} | {value:.1f} |" for name, value in rows.items()), "",
        f"{platform.machine()}, {torch.get_num_threads()} threads, a shared machine, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Written by bench/reports/checkpoint.py.", "",
    ])  # fmt: skip


def main() -> None:
    root = argparse.ArgumentParser(description=__doc__)
    root.add_argument("--gigabytes", type=float, default=0.5)
    root.add_argument("--hidden", type=int, default=2048)
    root.add_argument("--width", type=int, default=5504)
    root.add_argument("--vocabulary", type=int, default=32000)
    root.add_argument(
        "--groups", type=int, help="plant and match only so many MLPs; every group where left out"
    )
    root.add_argument("--dir", type=Path, default=Path("/tmp/fastmatch-bench"))
    root.add_argument("--out", type=Path)
    root.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = root.parse_args()
    a, b, out = (args.dir / name for name in ("a", "b", "out"))
    if args.measure:
        print(json.dumps(measure(a, b, out, args.groups)))
        return
    h, w, v = args.hidden, args.width, args.vocabulary
    layer = 2 * (h * h * 5 // 2 + 3 * h * w)
    layers = max(1, round((args.gigabytes * 1e9 - 4 * v * h) / layer))
    args.dir.mkdir(parents=True)
    try:
        size = make(a, (h, layers, w, v), seed=0)
        plant(a, b, args.groups, seed=1)
        command = [sys.executable, __file__, "--measure", "--dir", str(args.dir)]
        command += ["--groups", str(args.groups)] if args.groups is not None else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        text = report(json.loads(done.stdout.splitlines()[-1]), size, (h, layers, w, v))
    finally:
        shutil.rmtree(args.dir)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
