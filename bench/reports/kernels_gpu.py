"""The GPU: kernels against float64, ceilings and torch; public calls against the CPU; solves; a profile.

    python -m bench.reports.kernels_gpu --out DIR                     every part, on a CUDA or HIP machine
    python -m bench.reports.kernels_gpu --out DIR --parts env:10 ceilings:20 calls:90 kernels:200
    python -m bench.reports.kernels_gpu --tiny --device cpu                       the CPU implementations
    TRITON_INTERPRET=1 python -m bench.reports.kernels_gpu --tiny --device cpu --backend triton
    python -m bench.reports.kernels_gpu --page                        the page, from the committed findings

Each finding is one JSON line of ``DIR/findings.jsonl``, written at once. An error is a finding too and stops nothing. A
part starts no finding after its seconds. Nothing has to be installed: ``PYTHONPATH=$PWD:$PWD/kernels``.

A kernel is timed only after its result has passed the check. Times are medians. Ceilings (copy, and products of each
precision by torch) are measured in the same run. On the CPU and in Triton's interpreter sizes are small: they show that the
script runs, and tell nothing about a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.lib import gpu_calls, gpu_tiles, record, roofline
from bench.lib.findings import Findings, read_findings
from bench.lib.machine import machine, versions
from fastmatch_kernels import ops as kernels

NAME = "kernels_gpu"
COMMITTED = record.RESULTS / f"{NAME}.jsonl"

PARTS = {
    "env": 15,
    "ceilings": 20,
    "calls": 120,
    "kernels": 200,
    "solve": 60,
    "peers": 60,
    "profile": 40,
    "tiles": 40,
}
"""Parts in order, and the seconds of each by default. The last one is for who changes the table of tiles."""

PRECISIONS = ("fp16", "fp16x3", "half", "ieee")

LAUNCHING = 4_000_000
"""Cycles that a device waits while the host launches: 2 ms."""

Row = dict[str, Any]
Finding = tuple[str, Row, Callable[[], Row]]
"""A name, what is known beforehand, and a function that checks, measures and returns the rest."""


@dataclass(frozen=True)
class Bench:
    """One device and backend. Times functions and makes rows."""

    device: torch.device
    backend: str
    repeats: int
    ceilings: dict[str, float] = field(default_factory=dict)
    """Measured: "copy" in byte/s, and FLOP/s by precision."""

    def seconds(self, function):
        """Return the median seconds of a call, after one to warm up; of a GPU its own time, without the host's.

        The device is kept busy while the host launches, so that it finds all launches waiting.
        """
        function()
        times = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(LAUNCHING)
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                function()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, device=self.device).to(dtype)

    def row(self, ours, peer, work, error) -> Row:
        """Time both. ``error`` is the measured error over the allowed one, ``work`` the roofline's and its precision."""
        if not error <= 1:
            raise AssertionError(f"{error:.3g} times the allowed error")
        mine, theirs = self.seconds(ours), self.seconds(peer)
        done, precision = work
        least = done.seconds(target_of(self), precision)
        found = {
            "error / bound": error,
            "ms": 1e3 * mine,
            "torch ms": 1e3 * theirs,
            "torch / ours": theirs / mine,
            "predicted ms": 1e3 * least,
            "fraction of the roofline": least / mine,
        }
        if "copy" in self.ceilings:
            found["fraction of the copy"] = done.bytes / mine / self.ceilings["copy"]
        if done.flops and precision in self.ceilings:
            found["fraction of the products"] = done.flops / mine / self.ceilings[precision]
        return found


def sample_rows(n, count=256):
    """Return evenly spread rows: checking all of them in float64 would cost more than the benchmark."""
    return torch.linspace(0, n - 1, min(n, count)).long()


def run_products(bench: Bench, n: int, d: int, k: int) -> Iterator[Finding]:
    from fastmatch_kernels._triton.tiles import precision_of
    from fastmatch_kernels.row_topk.triton import product_error

    target = target_of(bench)
    for precision in PRECISIONS if bench.repeats > 1 else ("ieee", "half"):
        dtype = torch.bfloat16 if precision == "half" else torch.float32
        asked = "ieee" if precision == "half" else precision
        a, b, v = bench.normal(n, d, dtype=dtype), bench.normal(n, d, dtype=dtype), bench.normal(n)
        some = sample_rows(n).to(bench.device)
        exact = a[some].double() @ b.double().T
        key, size = precision_of(dtype, asked), dtype.itemsize
        options = {"precision": asked, "backend": bench.backend}
        shape = {"shape": f"{n} x {n} x {d}", "precision": precision}
        order = torch.randperm(d)

        def gain(
            index=None, a=a, b=b, options=options, some=some, key=key, size=size, exact=exact, asked=asked
        ):
            out = torch.empty(n, n, device=bench.device)
            more = {"out": out, "contraction_index": index, **options}
            kernels.gain([(a, b)], **more)
            wanted = exact if index is None else a[some].double() @ b[:, index.to(b.device)].double().T
            allowed = product_error([(a[some], b)], torch.zeros(n, device=bench.device), asked)[:, None]
            error = float(((out[some].double() - wanted).abs() / allowed).max())
            peer = lambda: a @ (b if index is None else b[:, index.to(b.device)]).T  # noqa: E731
            return bench.row(
                lambda: kernels.gain([(a, b)], **more), peer, (roofline.gain(n, n, d, size), key), error
            )

        yield "gain", shape, gain
        # Against a reordered copy.
        yield "gain, B's columns gathered", shape, lambda gain=gain, order=order: gain(order)
        if bench.backend == "triton":
            at, bt = (x.T.contiguous().T for x in (a, b))
            yield "gain, factors transposed", shape, lambda gain=gain, at=at, bt=bt: gain(a=at, b=bt)
        yield (
            "row_softmin",
            shape,
            lambda a=a, b=b, v=v, some=some, exact=exact, asked=asked: softmin_row(
                bench, a, b, v, some, exact, asked
            ),
        )
        if bench.backend == "cpu":
            continue  # the report kernels_cpu has row_topk on the CPU

        def topk(a=a, b=b, v=v, options=options, some=some, exact=exact, key=key, size=size, asked=asked):
            index, cost, bound = kernels.row_topk([(a, b)], v, k, **options)
            allowed = product_error([(a[some], b)], v, asked)[:, None]
            value = -exact - v.double()
            got = cost[some].double() - v.double()[index[some]]
            error = float(((got - value.gather(1, index[some])).abs() / (2 * allowed)).max())
            outside = value.scatter(1, index[some], float("inf")).amin(1)
            if not bool((bound[some].double() <= outside).all()):
                raise AssertionError("the bound is above a value outside the list")
            row = bench.row(
                lambda: kernels.row_topk([(a, b)], v, k, **options),
                lambda: (-(a @ b.T).float() - v).topk(k, dim=1, largest=False),
                (roofline.cost_rows(n, n, d, k, key, target, size), key),
                error,
            )
            return {**row, "certain": float((got <= bound[some].double()[:, None]).double().mean())}

        yield "row_topk", {**shape, "k": k}, topk


def softmin_row(bench, a, b, v, some, exact, asked):
    from fastmatch_kernels._triton.tiles import precision_of
    from fastmatch_kernels.row_topk.triton import product_error

    n, d = a.shape
    t = d**0.5  # the costs' own spread: many terms count
    options = {"precision": asked, "backend": bench.backend}
    wanted = -t * ((exact + v.double()) / t).logsumexp(1)
    allowed = product_error([(a[some], b)], v, asked) + 2.0**-18 * t * (1 + math.log(n))
    got = kernels.row_softmin([(a, b)], v, t, **options)[some]
    key = precision_of(a.dtype, asked)
    return bench.row(
        lambda: kernels.row_softmin([(a, b)], v, t, **options),
        lambda: -t * (((a @ b.T).float() + v) / t).logsumexp(1),
        (roofline.row_softmin(n, n, d, key, target_of(bench), a.element_size()), key),
        float(((got.double() - wanted).abs() / allowed).max()),
    )


def three_passes(a, b):
    """Correlation in float64, as it is usually written: means, standard deviations, product."""
    a, b = (x.double() for x in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    return (a / a.std(0)).T @ (b / b.std(0))


def rows_of(x):
    """(samples, channels) of activations with channels along dimension 1."""
    return x if x.ndim == 2 else x.movedim(1, -1).reshape(-1, x.shape[1])


def run_moments(bench: Bench, shape: tuple[int, ...]) -> Iterator[Finding]:
    samples, n = math.prod(shape) // shape[1], shape[1]
    a, b = bench.normal(*shape), bench.normal(*shape) + 1
    for precision in ("fp16x3", "fp16", "ieee") if bench.repeats > 1 else ("fp16x3",):

        def moments(precision=precision):
            p, q = rows_of(a).double(), rows_of(b).double()
            wanted = (p - p.mean(0)).T @ (q - q.mean(0)) / samples
            del p, q
            options = {"precision": precision, "backend": bench.backend}
            state = kernels.moments(a, b, **options)
            unit = {"ieee": 2.0**-20, "fp16": 2.0**-8.9, "fp16x3": 2.0**-18}[precision]
            error = float((state.covariance() - wanted).abs().max() / (4 * unit))
            return bench.row(
                lambda: kernels.moments(a, b, state=state, **options).settle(),
                lambda: three_passes(rows_of(a), rows_of(b)),
                (roofline.moments(samples, n, n), precision),
                error,
            )

        yield "moments", {"shape": " x ".join(map(str, shape)), "precision": precision}, moments


def run_merges(bench: Bench, n: int) -> Iterator[Finding]:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = bench.normal(n, n, dtype=dtype), bench.normal(n, n, dtype=dtype)
        first, second = (torch.randperm(n, device=bench.device) for _ in range(2))
        for name, rows, columns in (
            ("average", None, None),
            ("rows", first, None),
            ("rows, columns", first, second),
        ):

            def merge(a=a, b=b, rows=rows, columns=columns, dtype=dtype):
                out = torch.empty_like(a)

                def ours():
                    return kernels.permute_merge(
                        [a, b], [0.5, 0.5], [None, rows], [None, columns], out=out, backend=bench.backend
                    )

                def moved():
                    picked = b if rows is None else b.index_select(0, rows)
                    return picked if columns is None else picked.index_select(1, columns)

                wanted = 0.5 * a.double() + 0.5 * moved().double()
                # One unit in the last place: the interpreter cuts bfloat16 off.
                allowed = torch.finfo(dtype).eps * wanted.abs() + 1e-6
                error = float(((ours().double() - wanted).abs() / allowed).max())
                work = roofline.permute_merge(n * n, 2, dtype.itemsize)
                return bench.row(ours, lambda: torch.lerp(a, moved(), 0.5), (work, "ieee"), error)

            yield f"permute_merge, {name}", {"shape": f"{n} x {n}", "precision": str(dtype)}, merge


def run_affine(bench: Bench, shape: tuple[int, ...]) -> Iterator[Finding]:
    channels, others = shape[1], [d for d in range(len(shape)) if d != 1]
    view = [1, -1, *[1] * (len(shape) - 2)]

    def affine():
        x = bench.normal(*shape)
        goal_mean, goal_std = bench.normal(channels).double(), bench.normal(channels).double().abs() + 0.1
        out = torch.empty_like(x)

        def renormalized():
            return kernels.channel_affine(x, goal_mean, goal_std, out=out, backend=bench.backend)[0]

        def composed():
            variance, mean = torch.var_mean(x, dim=others, correction=0)
            scale = goal_std.float() / (variance + 1e-5).sqrt()
            shift = goal_mean.float() - scale * mean
            return x * scale.view(view) + shift.view(view)

        error = float((renormalized() - composed()).abs().max() / 1e-3)
        return bench.row(renormalized, composed, (roofline.channel_affine(x.numel()), "ieee"), error)

    yield "channel_affine", {"shape": " x ".join(map(str, shape)), "precision": "ieee"}, affine


def run_entries(bench: Bench, n: int, d: int, k: int) -> Iterator[Finding]:
    from fastmatch_kernels.row_topk import entries, reference

    def scored():
        a, b = bench.normal(n, d), bench.normal(n, d)
        rows = torch.arange(n, device=bench.device)
        items = torch.randint(n, (n, k), device=bench.device)
        some = sample_rows(n).to(bench.device)
        wanted = reference.entries([(a, b)], some, items[some])
        error = float((entries([(a, b)], rows, items)[some] - wanted).abs().max() / 1e-9)
        work = roofline.Work(4 * n * k * d, 2 * n * k * d)
        return bench.row(
            lambda: entries([(a, b)], rows, items),
            lambda: reference.entries([(a, b)], rows, items),
            (work, "ieee"),
            error,
        )

    yield "entries in float64", {"shape": f"{n} x {k} x {d}", "precision": "float64"}, scored


def kernel_findings(bench: Bench, sizes: list[int] | None, tiny: bool) -> Iterator[Finding]:
    """The kernels, the decisive shapes first, for a run that is cut off."""
    torch.manual_seed(0)
    if tiny:
        for n in sizes or [48]:
            yield from run_products(bench, n, 24, 16)
            yield from run_moments(bench, (80, n))
            yield from run_moments(bench, (5, n, 4, 4))
            yield from run_merges(bench, n)
            yield from run_affine(bench, (2, n, 8, 8))
            yield from run_entries(bench, n, 24, 16)
        return
    wide = sizes or [16384]
    for n in wide:
        yield from run_products(bench, n, 4096, 48)
    for shape in ((65536, 4096), (1024, 4096, 8, 8), (128, 64, 56, 56), (65536, 512)):
        yield from run_moments(bench, shape)
    for n in wide:
        yield from run_merges(bench, n)
    for shape in ((128, 64, 56, 56), (128, 512, 14, 14), (65536, 512), (25216, 768), (1024, 4096, 8, 8)):
        yield from run_affine(bench, shape)
    yield from run_entries(bench, 16384, 1024, 48)
    yield from run_products(bench, 65536, 256, 48)
    yield from run_products(bench, 4096, 1024, 48)


def target_of(bench):
    """Return the target of the predictions: the device's, or an H100 where there is no GPU."""
    from fastmatch_kernels._triton.tiles import TARGETS
    from fastmatch_kernels._triton.tiles import target_of as device_target

    return device_target(bench.device) if bench.device.type == "cuda" else TARGETS["sm_90"]


def ceilings(bench: Bench, tiny: bool) -> Row:
    """Measure what the device reaches: bytes read and written by a copy, and products by torch."""
    n = 128 if tiny else 8192
    x = bench.normal(n * n)
    y = torch.empty_like(x)
    bench.ceilings["copy"] = 8.0 * n * n / bench.seconds(lambda: y.copy_(x))
    kinds = {"ieee": torch.float32, "tf32": torch.float32, "half": torch.bfloat16, "float64": torch.float64}
    for key, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = key == "tf32"
        p, q = bench.normal(n, n, dtype=dtype), bench.normal(n, n, dtype=dtype)
        bench.ceilings[key] = 2.0 * n**3 / bench.seconds(lambda p=p, q=q: p @ q)
    torch.backends.cuda.matmul.allow_tf32 = False
    bench.ceilings.update(fp16=bench.ceilings["half"], fp16x3=bench.ceilings["half"] / 3)
    return {
        key: value / (1e9 if key == "copy" else 1e12) for key, value in bench.ceilings.items()
    }  # GB/s, TFLOP/s


def card(device: torch.device) -> Row:
    """The GPU, its driver and its clocks as found."""
    if device.type != "cuda":
        return {"gpu": "none"}
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    found = {
        "gpu": torch.cuda.get_device_name(device),
        "free_gib": torch.cuda.mem_get_info(device)[0] / 2**30,
    }
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {**found, "nvidia-smi": str(error)}
    values = done.stdout.splitlines()[0].split(", ")
    return {**found, **dict(zip(fields.split(",")[1:], values[1:], strict=True))}


def imports() -> Row:
    """Whether what the solvers need can be imported."""
    found: Row = {}
    for name in ("numba", "triton", "scipy", "lapjv"):
        try:
            found[name] = getattr(__import__(name), "__version__", "found")
        except Exception as error:  # an import may fail in any way
            found[name] = f"{type(error).__name__}: {str(error)[:120]}"
    return found


def run(findings: Findings, bench: Bench, parts: dict[str, float], options: argparse.Namespace) -> None:
    """Run the named parts in the order of PARTS."""
    device, tiny = bench.device, options.tiny
    for name, default in PARTS.items():
        if name not in parts:
            continue
        with findings.part(name, parts[name] or default):
            if name == "env":
                findings.attempt("versions", lambda: versions(["triton", "scipy", "safetensors"]))
                findings.attempt("machine", lambda: machine())
                findings.attempt("card", lambda: card(device))
                findings.attempt("imports", imports)
            elif name == "ceilings":
                findings.attempt("ceilings", lambda: ceilings(bench, tiny))
            elif name == "calls":
                gpu_calls.calls(findings, device, tiny=tiny)
            elif name == "kernels":
                for what, more, measure in kernel_findings(bench, options.sizes, tiny):
                    findings.attempt(what, measure, **more)
            elif name == "solve":
                gpu_calls.solves(findings, device, tiny=tiny)
            elif name == "peers":
                gpu_calls.peers(findings, device, tiny=tiny)
            elif name == "profile":
                gpu_calls.profile(findings, device, options.out, tiny=tiny)
            else:
                gpu_tiles.tiles(findings, device, bench.seconds, tiny=tiny)
            if device.type == "cuda":
                findings.attempt("clocks after", lambda: card(device))


def measure(options: argparse.Namespace) -> Findings:
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if not (on_gpu or options.tiny):
        raise SystemExit("kernels_gpu: no GPU here; --tiny runs the same checks on the CPU")
    bench = Bench(device, options.backend or ("triton" if on_gpu else "cpu"), 1 if options.tiny else 10)
    findings = Findings(None if options.out is None else options.out / "findings.jsonl")
    run(findings, bench, dict(map(part_of, options.parts or [p for p in PARTS if p != "tiles"])), options)
    return findings


def part_of(text: str) -> tuple[str, float]:
    """``"kernels:200"`` as a part and its seconds; 0 for the default."""
    name, _, seconds = text.partition(":")
    if name not in PARTS:
        raise SystemExit(f"--parts: expected names of {tuple(PARTS)}, got {name!r}")
    return name, float(seconds or 0)


def page(found: list[Row]) -> str:
    """The page of a run: one table for each part."""
    lines = [
        "# On a GPU",
        "",
        "Written by `python -m bench.reports.kernels_gpu --page` from `kernels_gpu.jsonl`: the findings of four runs on one day, each on "
        "an H200. Parts without a run in their name are of the last one, but for tiles, of the second. "
        "Times of kernels are the device's own, medians of ten; in the first run with the host's. "
        "Predicted: the least time by the roofline. Error: the largest one over the documented bound. "
        "docs/design/kernels.md says what it means.",
    ]
    for part in dict.fromkeys(row["part"] for row in found):
        rows = [
            {k: v for k, v in row.items() if k not in ("part", "at", "ok")}
            for row in found
            if row["part"] == part
        ]
        keys = dict.fromkeys(key for row in rows for key in row)
        full = [{key: row.get(key, "") for key in keys} for row in rows]
        lines += ["", f"## {part}", "", record.table(full, form=".3g").rstrip("\n")]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "cpu"), help="by the device if omitted")
    parser.add_argument("--sizes", type=int, nargs="+", help="widths n of the largest products and merges")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART[:SECONDS]", help=f"of {', '.join(PARTS)}; all if omitted"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for findings.jsonl and profile.txt; only print if omitted"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--page", action="store_true", help=f"write the page from {COMMITTED.name}")
    options = parser.parse_args(arguments)
    if options.page:
        COMMITTED.with_suffix(".md").write_text(page(read_findings(COMMITTED)))
        return 0
    measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
