"""What a process waits for: imports, help, its first alignment, and the traces of large networks.

    python -m bench.reports.first_second

Processor seconds, because compilation and imports run on one thread and other work on the machine does not count. Each
measurement is a process of its own. Importing torch is not counted, nor is building a network that is traced. Python's full
garbage collections look at every object that torch has made, whatever comes after its import; they are counted, and shown
beside.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from statistics import median
from typing import Any

from bench.lib import record

NAME = "first_second"

REPEATS = 3

COLLECTIONS = "full garbage collections"

ALIGN = """
import gc, time, torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(20, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU(), nn.Linear({width}, 10))

times = []
def collection(phase, info):
    if info["generation"] == 2:
        times.append(time.process_time())

torch.manual_seed(0)
a, b, x = mlp(), mlp(), torch.randn(8, 20)
gc.callbacks.append(collection)
begin = time.process_time()
import fastmatch as fm
fm.align(a, b, x)
print([time.process_time() - begin, sum(times[1::2]) - sum(times[::2])])
"""

TRACE = """
import time, torch
import fastmatch as fm
{build}
begin = time.process_time()
fm.PermutationSpec.trace(model, (), kwargs=inputs, unread="ignore")
print(time.process_time() - begin)
"""

PICTURES = "inputs = dict(pixel_values=torch.randn(2, 3, 224, 224))"

NETWORKS = {
    "ViT-L": f"""
from transformers import ViTConfig, ViTModel
config = ViTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
model = ViTModel(config)
{PICTURES}
""",
    "ResNet-152": f"""
from transformers import ResNetConfig, ResNetModel
model = ResNetModel(ResNetConfig(depths=[3, 8, 36, 3], layer_type="bottleneck"))
{PICTURES}
""",
    "UNet of SD 1.5": """
from diffusers import UNet2DConditionModel
model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
inputs = dict(
    sample=torch.randn(2, 4, 64, 64), timestep=torch.tensor([1, 2]), encoder_hidden_states=torch.randn(2, 77, 768)
)
""",
}

SEVEN_BILLION = """
import json, tempfile, time
import torch, transformers
from fastmatch.checkpoint import trace_config
folder = tempfile.mkdtemp()
transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
begin = time.process_time()
trace_config(folder)
print(time.process_time() - begin)
"""


def spent(command: list[str]) -> float:
    """Return the processor seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def printed(code: str, cache: str) -> Any:
    """Return what code prints in a new process, with kernels from a folder, or the usual ones for none."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **({"NUMBA_CACHE_DIR": cache} if cache else {}), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def starts() -> Iterator[record.Row]:
    """Yield a row for the package and one for the help, less what the interpreter takes."""
    commands = {
        "import fastmatch": ["-c", "import fastmatch"],
        "fastmatch --help": ["-m", "fastmatch", "--help"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPEATS):
        bare = spent([sys.executable, "-c", ""])
        for name, command in commands.items():
            found[name].append(spent([sys.executable, *command]) - bare)
    targets = {"import fastmatch": 0.1, "fastmatch --help": 0.3}
    for name, seconds in found.items():
        yield {"what": name, "seconds": median(seconds), "target": targets[name]}


def alignments(width: int, targets: tuple[float, float]) -> Iterator[record.Row]:
    """Yield the first alignment of a process, with an empty cache of kernels and with a filled one."""
    code = ALIGN.format(width=width)
    printed(code, "")  # compiles the modules themselves
    with tempfile.TemporaryDirectory() as cache:
        empty = [printed(code, cache)]
        filled = [printed(code, cache) for _ in range(REPEATS)]
    for state, runs, target in zip(("empty", "filled"), (empty, filled), targets, strict=True):
        seconds, collections = (median(parts) for parts in zip(*runs, strict=True))
        yield {
            "what": f"first alignment, MLP of {width}, {state} cache",
            "seconds": seconds,
            COLLECTIONS: collections,
            "target": target,
        }


def traces() -> Iterator[record.Row]:
    """Yield the first trace of a process for each network."""
    codes = {name: TRACE.format(build=build) for name, build in NETWORKS.items()}
    codes["Llama 7B, by its configuration"] = SEVEN_BILLION
    for name, code in codes.items():
        yield {"what": f"trace, {name}", "seconds": printed(code, ""), "target": 2.0}


def rows(*, tiny: bool) -> Iterator[record.Row]:
    yield from starts()
    yield from alignments(32, (0.1, 0.1))
    if not tiny:
        yield from alignments(512, (4.0, 0.5))
        yield from traces()


def measure(options: argparse.Namespace) -> record.Record:
    return record.record(rows(tiny=options.tiny), packages=("transformers", "diffusers"))


def page(found: record.Record) -> str:
    return record.page(
        "The first second of a process",
        NAME,
        found,
        "Processor seconds beyond the interpreter and `import torch`; the first call of a process each. Full garbage collections "
        "are those that Python makes in these seconds, of the objects that torch has made.",
        record.table(
            [{COLLECTIONS: "-", **row} for row in found["rows"]], ["what", "seconds", COLLECTIONS, "target"]
        ),
    )


main = record.script(NAME, __doc__, measure, page)

if __name__ == "__main__":
    sys.exit(main())
