"""Each kernel on a GPU: checked against float64, timed against torch's operations and against the roofline.

    python -m bench.reports.kernels_gpu                   on a CUDA or HIP machine
    python -m bench.reports.kernels_gpu --tiny --device cpu                       the CPU implementations
    TRITON_INTERPRET=1 python -m bench.reports.kernels_gpu --tiny --device cpu --backend triton

A row is recorded only after its result has passed the check. Times are medians. On the CPU and in Triton's interpreter
sizes are small: they show that the script runs, and tell nothing about a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.lib import record, roofline
from fastmatch_kernels import ops as kernels

NAME = "kernels_gpu"


@dataclass(frozen=True)
class Bench:
    """One device and backend. Times functions and makes rows."""

    device: torch.device
    backend: str
    repeats: int

    def seconds(self, function):
        """Return the median seconds of a call, after one to warm up."""
        function()
        times = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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

    def row(self, name, shape, precision, ours, peer, work, error) -> record.Row:
        """Time both. ``error`` is the measured error over the allowed one, ``work`` the roofline's and its precision."""
        if not error <= 1:
            raise AssertionError(f"{name} {shape} {precision}: {error:.3g} times the allowed error")
        mine, theirs = self.seconds(ours), self.seconds(peer)
        least = work[0].seconds(target_of(self), work[1])
        return {
            "operation": name,
            "shape": shape,
            "precision": precision,
            "error / bound": error,
            "ms": 1e3 * mine,
            "torch ms": 1e3 * theirs,
            "torch / ours": theirs / mine,
            "predicted ms": 1e3 * least,
            "fraction of the roofline": least / mine,
        }


def sample_rows(n, count=256):
    """Return evenly spread rows: checking all of them in float64 would cost more than the benchmark."""
    return torch.linspace(0, n - 1, min(n, count)).long()


def run_products(bench, n, d, k):
    from fastmatch_kernels._triton.tiles import precision_of
    from fastmatch_kernels.row_topk.triton import product_error

    target = target_of(bench)
    for precision in ("ieee", "tf32", "bf16x3", "half") if bench.repeats > 1 else ("ieee", "half"):
        dtype = torch.bfloat16 if precision == "half" else torch.float32
        asked = "ieee" if precision == "half" else precision
        a, b, v = bench.normal(n, d, dtype=dtype), bench.normal(n, d, dtype=dtype), bench.normal(n)
        some = sample_rows(n).to(bench.device)
        exact = a[some].double() @ b.double().T
        zero = torch.zeros_like(v)
        allowed = product_error([(a[some], b)], zero, asked)[:, None]
        key, size = precision_of(dtype, asked), dtype.itemsize
        torch.backends.cuda.matmul.allow_tf32 = precision in ("tf32", "bf16x3")

        out = torch.empty(n, n, device=bench.device)
        options = {"precision": asked, "backend": bench.backend}
        kernels.gain([(a, b)], out=out, **options)
        error = float(((out[some].double() - exact).abs() / allowed).max())
        yield bench.row(
            "gain",
            f"{n} x {n} x {d}",
            precision,
            lambda a=a, b=b, o=options, out=out: kernels.gain([(a, b)], out=out, **o),
            lambda a=a, b=b: a @ b.T,
            (roofline.gain(n, n, d, size), key),
            error,
        )
        yield run_softmin(bench, a, b, v, some, exact, precision, asked)
        if bench.backend == "cpu":
            continue  # the report kernels_cpu has row_topk on the CPU
        index, cost, bound = kernels.row_topk([(a, b)], v, k, **options)
        allowed = product_error([(a[some], b)], v, asked)[:, None]
        value = -exact - v.double()
        got = cost[some].double() - v.double()[index[some]]
        error = float(((got - value.gather(1, index[some])).abs() / (2 * allowed)).max())
        outside = value.scatter(1, index[some], float("inf")).amin(1)
        if not bool((bound[some].double() <= outside).all()):
            raise AssertionError(f"row_topk {n} {precision}: the bound is above a value outside the list")
        yield bench.row(
            "row_topk",
            f"{n} x {n} x {d}, k = {k}",
            precision,
            lambda a=a, b=b, v=v, o=options: kernels.row_topk([(a, b)], v, k, **o),
            lambda a=a, b=b, v=v: (-(a @ b.T).float() - v).topk(k, dim=1, largest=False),
            (roofline.cost_rows(n, n, d, k, key, target, size), key),
            error,
        )


def run_softmin(bench, a, b, v, some, exact, precision, asked):
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
        "row_softmin",
        f"{n} x {n} x {d}, t = {t:.3g}",
        precision,
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


def run_moments(bench, samples, n):
    for name, lift in (
        ("rows", lambda x: x),
        ("contiguous maps", lambda x: x.view(-1, 16, n).transpose(1, 2).contiguous()),
    ):
        a, b = bench.normal(samples, n), bench.normal(samples, n) + 1
        wanted = (a.double() - a.double().mean(0)).T @ (b.double() - b.double().mean(0)) / samples
        a, b = lift(a), lift(b)
        for precision in ("ieee", "tf32", "bf16x3") if bench.repeats > 1 else ("ieee",):
            options = {"precision": precision, "backend": bench.backend}
            state = kernels.moments(a, b, **options)
            unit = {"ieee": 2.0**-20, "tf32": 2.0**-8.9, "bf16x3": 2.0**-16}[precision]
            error = float((state.covariance() - wanted).abs().max() / (4 * unit))
            yield bench.row(
                "moments",
                f"{samples} x {n}, {name}",
                precision,
                lambda a=a, b=b, o=options, s=state: kernels.moments(a, b, state=s, **o).settle(),
                lambda a=a, b=b: three_passes(flat(a), flat(b)),
                (roofline.moments(samples, n, n), precision),
                error,
            )


def flat(x):
    return x if x.ndim == 2 else x.transpose(1, 2).reshape(-1, x.shape[1])


def run_memory(bench, n):
    for dtype in (torch.float32, torch.bfloat16):
        a, b = bench.normal(n, n, dtype=dtype), bench.normal(n, n, dtype=dtype)
        rows, columns = (torch.randperm(n, device=bench.device) for _ in range(2))
        out = torch.empty_like(a)

        def ours(a=a, b=b, rows=rows, columns=columns, out=out):
            return kernels.permute_merge(
                [a, b], [0.5, 0.5], [None, rows], [None, columns], out=out, backend=bench.backend
            )

        def peer(a=a, b=b, rows=rows, columns=columns):
            return torch.lerp(a, b.index_select(0, rows).index_select(1, columns), 0.5)

        wanted = 0.5 * a.double() + 0.5 * b[rows][:, columns].double()
        # One unit in the last place: the interpreter cuts bfloat16 off.
        allowed = torch.finfo(dtype).eps * wanted.abs() + 1e-6
        error = float(((ours().double() - wanted).abs() / allowed).max())
        work = roofline.permute_merge(n * n, 2, dtype.itemsize)
        yield bench.row("permute_merge", f"{n} x {n} {dtype}", "ieee", ours, peer, (work, "ieee"), error)

    x = bench.normal(2 if bench.repeats == 1 else 32, n, 8, 8)
    goal_mean, goal_std = bench.normal(n).double(), bench.normal(n).double().abs() + 0.1
    out = torch.empty_like(x)

    def renormalized():
        return kernels.channel_affine(x, goal_mean, goal_std, out=out, backend=bench.backend)[0]

    def composed():
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        gain = goal_std.float() / (variance + 1e-5).sqrt()
        shift = goal_mean.float() - gain * mean
        return x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    error = float((renormalized() - composed()).abs().max() / 1e-3)
    work = roofline.channel_affine(x.numel())
    yield bench.row(
        "channel_affine", f"{len(x)} x {n} x 8 x 8", "ieee", renormalized, composed, (work, "ieee"), error
    )


def run_assignment(bench, n):
    """A matrix on the device: solved there by reading its rows, against copying it. Predicted: three reads of it."""
    from fastmatch.assignment import CandidateLists, DenseShortlists, solve

    matrix = bench.normal(n, n)
    here, copied = (solve(matrix, solver=solver) for solver in (CandidateLists(), DenseShortlists()))
    error = abs(here.objective - copied.objective) / (here.gap_bound + copied.gap_bound)
    yield bench.row(
        "solve a device matrix",
        f"{n} x {n}",
        "ieee",
        lambda: solve(matrix, solver=CandidateLists()),
        lambda: solve(matrix, solver=DenseShortlists()),
        (roofline.Work(3 * matrix.nbytes), "ieee"),
        error,
    )


def target_of(bench):
    """Return the target of the predictions: the device's, or an H100 where there is no GPU."""
    from fastmatch_kernels._triton.tiles import TARGETS
    from fastmatch_kernels._triton.tiles import target_of as device_target

    return device_target(bench.device) if bench.device.type == "cuda" else TARGETS["sm_90"]


def rows(bench: Bench, sizes: list[int], tiny: bool) -> Iterator[record.Row]:
    torch.manual_seed(0)
    for n in sizes:
        yield from run_products(bench, n, 24 if tiny else 4096, 16)
        yield from run_moments(bench, 80 if tiny else 65536, n)
        yield from run_memory(bench, n)
        yield from run_assignment(bench, n)


def measure(options: argparse.Namespace) -> record.Record:
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if not (on_gpu or options.tiny):
        raise SystemExit("kernels_gpu: no GPU here; --tiny runs the same checks on the CPU")
    bench = Bench(device, options.backend or ("triton" if on_gpu else "cpu"), 1 if options.tiny else 20)
    settings = {"backend": bench.backend, "predicted for": target_of(bench).name}
    if on_gpu:
        settings["gpu"] = torch.cuda.get_device_name(device)
    sizes = options.sizes or ([48] if options.tiny else [4096, 8192, 16384])
    return record.record(rows(bench, sizes, options.tiny), packages=["triton"], **settings)


def page(found: record.Record) -> str:
    settings = found["settings"]
    return record.page(
        "The kernels on a GPU", NAME, found,
        f"GPU: {settings['gpu']}. Predicted: the least time on {settings['predicted for']} by the roofline. "
        "Error: the largest one over the documented bound.",
        record.table(found["rows"], form=".3g"),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "cpu"), help="by the device if omitted")
    parser.add_argument("--sizes", type=int, nargs="+", help="widths n")
    return record.run(NAME, measure, page, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
