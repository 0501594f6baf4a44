"""The part of the GPU report that times the candidates for the table of tiles, ``fastmatch_kernels._triton.tiles.MATMUL``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.lib.findings import Findings
from fastmatch_kernels import ops as kernels
from fastmatch_kernels._triton.tiles import MATMUL, Tiles, target_of

__all__ = ["tiles"]

ONE = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 32, 4, 3),
)
THREE = (
    (128, 128, 64, 8, 2),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 256, 32, 8, 3),
    (128, 128, 32, 4, 3),
)
"""Rows, columns, depth, warps, stages: of single products, and of three."""

SHAPES = ((16384, 4096), (65536, 256), (4096, 1024), (2048, 512))
SHORTLIST = 48


@contextmanager
def _using(device: torch.device, chosen: Tiles) -> Iterator[None]:
    """Take one tile for every product on the device."""
    table = MATMUL[target_of(device).name]
    before = dict(table)
    kinds = ("", ", written", ", reduced", ", summed")
    table.update({f"{p}{kind}": (chosen, chosen) for p in ("half", "fp16", "fp16x3") for kind in kinds})
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def tiles(
    findings: Findings, device: torch.device, seconds: Callable[[Callable[[], Any]], float], *, tiny: bool
) -> None:
    """Time the products of each shape with each candidate, packing included."""
    for n, d in ((48, 24),) if tiny else SHAPES:
        named = _products(n, d, device)
        for precision, candidates in (("fp16", ONE), ("fp16x3", THREE)):
            for numbers, (name, function) in itertools.product(candidates, named.items()):

                def run(
                    function: Callable[[Any], Any] = function,
                    numbers: Any = numbers,
                    precision: str = precision,
                ) -> dict[str, Any]:
                    with _using(device, Tiles(*numbers)):
                        return {"ms": 1e3 * seconds(lambda: function(precision))}

                findings.attempt(name, run, shape=f"{n} x {n} x {d}", precision=precision, tile=str(numbers))


def _products(n: int, d: int, device: torch.device) -> dict[str, Callable[[Any], Any]]:
    """Functions of a precision."""
    a, b, v = (
        torch.randn(n, d, device=device),
        torch.randn(n, d, device=device),
        torch.randn(n, device=device),
    )
    out = torch.empty(n, n, device=device)
    return {
        "gain": lambda precision: kernels.gain([(a, b)], out=out, precision=precision),
        "row_topk": lambda precision: kernels.row_topk([(a, b)], v, SHORTLIST, precision=precision),
        "row_softmin": lambda precision: kernels.row_softmin([(a, b)], v, d**0.5, precision=precision),
    }
