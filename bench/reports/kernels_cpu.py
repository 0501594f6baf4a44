"""Each kernel's CPU implementation against torch's operations: ratios within one run, medians of alternating calls.

python -m bench.reports.kernels_cpu
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch

from bench.lib import record
from fastmatch_kernels import ops as kernels
from fastmatch_kernels.channel_affine.reference import affine_of
from fastmatch_kernels.matrix_product import addmm_nt, goes_to_onednn
from fastmatch_kernels.moments.reference import Moments, MomentsArguments, moments_update
from fastmatch_kernels.row_topk.reference import term_sizes

NAME = "kernels_cpu"


def alternate(functions, repeats: int) -> list[float]:
    """Return each function's median seconds. They are called in turn, so that other work slows all of them alike."""
    for function in functions:
        function()
    times = [[] for _ in functions]
    for _ in range(repeats):
        for taken, function in zip(times, functions, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


def close(name: str, got, wanted, allowed: float) -> None:
    error = float((got.double() - wanted.double()).abs().max())
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3g}, allowed {allowed:.3g}")


def bench_moments(repeats: int, tiny: bool) -> Iterator[record.Row]:
    shapes = [(64, 64, 32, 32), (64, 256, 16, 16), (64, 512, 8, 8), (4096, 512), (4096, 2048)]
    for shape in [(8, 16, 4, 4), (64, 32)] if tiny else shapes:
        for last in (False, True) if len(shape) == 4 else (False,):
            a, b = torch.randn(shape).relu_(), torch.randn(shape).relu_()
            if last:
                a, b = (x.to(memory_format=torch.channels_last) for x in (a, b))
            state, exact = Moments.empty(a, b), Moments.empty(a, b)
            kernels.moments(a, b, state=state, backend="cpu").settle()

            def reference(a=a, b=b, s=exact):
                moments_update(
                    MomentsArguments(a, b, 1, *s.shifts, *s.stats, s.cross["ab"], None, None, "ieee")
                )

            def lean(a=a, b=b, channels=shape[1]):
                """Raw float64 sums without a shift: the fewest passes, but large means lose precision."""
                rows = [x.double().movedim(1, -1).reshape(-1, channels) for x in (a, b)]
                return rows[0].T @ rows[1], [(x.sum(0), x.square().sum(0)) for x in rows]

            reference()
            exact.count = state.count
            close(f"moments {shape}", state.covariance(), exact.covariance(), 1e-4)
            ours, theirs, leanest = alternate(
                [
                    lambda a=a, b=b, s=state: kernels.moments(a, b, state=s, backend="cpu").settle(),
                    reference,
                    lean,
                ],
                repeats,
            )
            yield {
                "operation": "moments",
                "case": f"{' x '.join(map(str, shape))}{', channels last' if last else ''}",
                "ms": 1e3 * ours,
                "times faster than float64 torch": theirs / ours,
                "times faster than raw float64 sums": leanest / ours,
                "GFLOP/s": 2 * a.numel() * shape[1] / ours / 1e9,
            }


def bench_streamed_moments(repeats: int, tiny: bool) -> Iterator[record.Row]:
    """Linear layers get small batches. The float64 accumulator is read and written for each batch, or for many."""
    batch, batches, n = (8, 4, 32) if tiny else (128, 32, 2048)
    a, b = torch.randn(batches, batch, n).relu_(), torch.randn(batches, batch, n).relu_()

    def ours():
        state = None
        for x, y in zip(a, b, strict=True):
            state = kernels.moments(x, y, state=state, backend="cpu")
        return state.settle()

    def reference():
        state = Moments.empty(a[0], b[0])
        for x, y in zip(a, b, strict=True):
            moments_update(
                MomentsArguments(x, y, 1, *state.shifts, *state.stats, state.cross["ab"], None, None, "ieee")
            )
        state.count = batch * batches
        return state

    def lean():
        total = torch.zeros(n, n, dtype=torch.float64)
        for x, y in zip(a.double(), b.double(), strict=True):
            total += x.T @ y
            x.sum(0), x.square().sum(0), y.sum(0), y.square().sum(0)

    close("moments, streamed", ours().covariance(), reference().covariance(), 1e-4)
    mine, theirs, leanest = alternate([ours, reference, lean], max(repeats // 3, 1))
    yield {
        "operation": "moments",
        "case": f"{batches} batches of {batch} x {n}",
        "ms": 1e3 * mine,
        "times faster than float64 torch": theirs / mine,
        "times faster than raw float64 sums": leanest / mine,
        "GFLOP/s": 2 * batch * batches * n * n / mine / 1e9,
    }


def bench_permute_merge(repeats: int, tiny: bool) -> Iterator[record.Row]:
    n = 64 if tiny else 6144
    shapes = [
        ("linear", (n, n), (1, 1)),
        ("conv", (n // 3, n // 6, 3, 3), (1, 1)),
        ("flattened", (n // 3, n // 12 * 49), (1, 49)),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind, shape, blocks in shapes if dtype == torch.float32 else shapes[:1]:
            a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            out = torch.empty_like(a)
            rows = torch.randperm(shape[0])
            columns = torch.randperm(shape[1] // blocks[1])
            for variant, first, second in (
                ("average", None, None),
                ("rows", rows, None),
                ("rows and columns", rows, columns),
            ):

                def merged(first=first, second=second, a=a, b=b, out=out, blocks=blocks):
                    return kernels.permute_merge(
                        [a, b],
                        [0.5, 0.5],
                        [None, first],
                        [None, second],
                        blocks=blocks,
                        out=out,
                        backend="cpu",
                    )

                def composed(first=first, second=second, a=a, b=b, block=blocks[1]):
                    moved = b if first is None else b.index_select(0, first)
                    if second is not None:
                        full = (second[:, None] * block + torch.arange(block)).flatten()
                        moved = moved.index_select(1, full)
                    return torch.lerp(a, moved, 0.5)

                close(f"permute_merge {shape}", merged(), composed(), 4 * torch.finfo(dtype).eps)
                ours, theirs, copy = alternate([merged, composed, lambda out=out, a=a: out.copy_(a)], repeats)
                size = a.numel() * a.element_size()
                yield {
                    "operation": "permute_merge",
                    "case": f"{kind} {' x '.join(map(str, shape))} {dtype}, {variant}".replace("torch.", ""),
                    "ms": 1e3 * ours,
                    "fraction of copy bandwidth": (3 * size / ours) / (2 * size / copy),
                    "times faster than torch": theirs / ours,
                    "GB/s": 3 * size / ours / 1e9,
                }


def bench_matrix_product(repeats: int, tiny: bool) -> Iterator[record.Row]:
    """The product under all others, in the layouts that weights come in."""
    layouts = {
        "contiguous": lambda n, d: torch.randn(n, d),
        "transposed": lambda n, d: torch.randn(d, n).T,
        "part of wider rows": lambda n, d: torch.randn(n, d + 64)[:, :d],
    }
    sizes = [(600, 600), (2048, 2048), (4096, 256), (4096, 2048)]
    for n, d in [(64, 64)] if tiny else sizes:
        for layout, make in layouts.items():
            a, b, out = make(n, d), make(n, d), torch.zeros(n, n)

            def ours(a=a, b=b, out=out):
                return addmm_nt(out, a, b, beta=0)

            def theirs(a=a, b=b, out=out):
                return torch.mm(a, b.T, out=out)

            close("matrix_product", ours().clone(), theirs(), 1e-3)
            mine, other = alternate([ours, theirs], repeats)
            yield {
                "operation": "matrix_product",
                "case": f"{n} x {n} x {d}, {layout}",
                "library": "oneDNN" if goes_to_onednn(out, a, b) else "torch's own",
                "ms": 1e3 * mine,
                "times faster than torch.mm": other / mine,
                "GFLOP/s": 2 * n * n * d / mine / 1e9,
            }


def bench_gain(repeats: int, tiny: bool) -> Iterator[record.Row]:
    n, d = (64, 32) if tiny else (3072, 1024)
    a, b = torch.randn(n, d), torch.randn(n, d)
    rows, inner = torch.randperm(n), torch.randperm(d)
    out = torch.empty(n, n)
    for variant, options in (
        ("plain", {}),
        ("both axes of B reordered", {"b_index": rows, "contraction_index": inner}),
    ):

        def composed(reordered=bool(options)):
            return a @ (b[rows][:, inner] if reordered else b).T

        close("gain", kernels.gain([(a, b)], **options), composed(), 1e-3)
        ours, theirs, bare = alternate(
            [
                lambda o=options: kernels.gain([(a, b)], out=out, **o),
                composed,
                lambda: torch.mm(a, b.T, out=out),
            ],
            repeats,
        )
        yield {
            "operation": "gain",
            "case": f"{n} x {n} x {d}, {variant}",
            "ms": 1e3 * ours,
            "times the bare GEMM": ours / bare,
            "times faster than torch": theirs / ours,
        }


def bench_row_costs(repeats: int, tiny: bool) -> Iterator[record.Row]:
    n, k = (64, 4) if tiny else (4096, 16)
    for d in (16,) if tiny else (512, 1024):
        a, b, v = torch.randn(n, d), torch.randn(n, d), torch.randn(n)
        sizes = term_sizes([(a, b)])
        tile = torch.empty(min(n, 1024), n)

        def bare(a=a, b=b, tile=tile):
            """The float32 products alone, in tiles of the same rows."""
            for start in range(0, n, len(tile)):
                torch.mm(a[start : start + len(tile)], b.T, out=tile)

        def ours(a=a, b=b, v=v, sizes=sizes):
            return kernels.row_topk([(a, b)], v, k, sizes=sizes, backend="cpu")

        def composed(a=a, b=b, v=v):
            return (-(a @ b.T) - v).topk(k, dim=1, largest=False)

        def soft(a=a, b=b, v=v):
            return kernels.row_softmin([(a, b)], v, 1.0, backend="cpu")

        def soft_composed(a=a, b=b, v=v):
            return -(a @ b.T + v).logsumexp(1)

        index, costs, _ = ours()
        close("row_topk", costs - v[index], composed().values, 1e-3)
        close("row_softmin", soft(), soft_composed(), 1e-3)
        *pairs, least = alternate([ours, composed, soft, soft_composed, bare], repeats)
        for name, mine, theirs in (("row_topk", *pairs[:2]), ("row_softmin", *pairs[2:])):
            yield {
                "operation": name,
                "case": f"{n} x {n} x {d}" + (f", k = {k}" if name == "row_topk" else ""),
                "ms": 1e3 * mine,
                "times the bare GEMM": mine / least,
                "times faster than torch": theirs / mine,
            }


def bench_channel_affine(repeats: int, tiny: bool) -> Iterator[record.Row]:
    for shape in [(4, 8, 4, 4)] if tiny else [(64, 256, 32, 32), (8192, 2048)]:
        for last in (False, True) if len(shape) == 4 else (False,):
            x = torch.randn(shape) * 2 + 1
            if last:
                x = x.to(memory_format=torch.channels_last)
            goal_mean, goal_std = torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 0.5
            out = torch.empty_like(x)
            others = [d for d in range(x.ndim) if d != 1]
            view = [1, -1] + [1] * (x.ndim - 2)

            def composed(x=x, others=others, view=view, goals=(goal_mean, goal_std)):
                variance, mean = torch.var_mean(x, dim=others, correction=0)
                scale, shift = affine_of(mean.double(), variance.double(), *goals, "repair", 1e-5)
                return x * scale.float().view(view) + shift.float().view(view)

            def ours(x=x, goals=(goal_mean, goal_std), out=out):
                return kernels.channel_affine(x, *goals, out=out, backend="cpu")[0]

            close(f"channel_affine {shape}", ours(), composed(), 1e-3)
            mine, theirs, copy = alternate([ours, composed, lambda x=x, out=out: out.copy_(x)], repeats)
            yield {
                "operation": "channel_affine",
                "case": f"{' x '.join(map(str, shape))}{', channels last' if last else ''}",
                "ms": 1e3 * mine,
                "fraction of copy bandwidth": copy / mine,
                "times faster than torch": theirs / mine,
            }


OPERATIONS = (
    bench_matrix_product,
    bench_moments,
    bench_streamed_moments,
    bench_permute_merge,
    bench_gain,
    bench_row_costs,
    bench_channel_affine,
)


def measure(options: argparse.Namespace) -> record.Record:
    torch.manual_seed(0)
    repeats = 2 if options.tiny else options.repeats
    rows = (row for operation in OPERATIONS for row in operation(repeats, options.tiny))
    return record.record(rows, repeats=repeats)


def page(found: record.Record) -> str:
    note = f"Median of {found['settings']['repeats']} alternating calls. Ratios are within the run."
    return record.page(
        "The kernels on the CPU", NAME, found, note, record.sections(found["rows"], by="operation")
    )


main = record.script(NAME, __doc__, measure, page, repeats=(9, "timed calls of each function"))

if __name__ == "__main__":
    sys.exit(main())
