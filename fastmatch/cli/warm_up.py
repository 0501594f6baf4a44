"""``fastmatch warm-up``: compile every kernel once, for images of containers and nodes of clusters."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastmatch._internal.progress import progress_bar
from fastmatch.cli.options import Commands, add_command
from fastmatch.cli.outputs import say

__all__ = ["add_commands"]

UNITS = 160
"""Units of a layer of the networks, and rows of the matrices."""


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    add_command(commands, "warm-up", warm_up_command, examples=("warm-up", "warm-up --json"))


def warm_up_command(args: argparse.Namespace) -> None:
    """Run every kernel on small problems, and say how many were compiled, how long it took and where they are kept."""
    from fastmatch_kernels._numba.cache import folders

    def kept() -> dict[Path, Path]:
        return {file: folder for folder in folders() for file in folder.glob("*.nbc")}

    before, start = kept(), time.monotonic()
    compiling = logging.getLogger("fastmatch.assignment")
    level = compiling.level
    compiling.setLevel(logging.ERROR)  # it tells of every kernel that it compiles
    try:
        for step in progress_bar([*_assignments(), *_merges(), *_networks()], "compiling"):
            step()
    finally:
        compiling.setLevel(level)
    seconds, after = time.monotonic() - start, kept()
    compiled = after.keys() - before
    where = sorted({str(folder) for folder in after.values()})
    say(
        args,
        f"compiled {len(compiled)} functions in {seconds:.0f} s; {len(after)} are kept in {' and '.join(where)}"
        if where
        else f"compiled all kernels in {seconds:.0f} s, but kept none: set NUMBA_CACHE_DIR to a folder that can be written",
        compiled=len(compiled), kept=len(after), seconds=seconds, folders=where,
    )  # fmt: skip


def _assignments() -> Iterator[Callable[[], Any]]:
    """Yield solves of every kind of cost, in both types that kernels are compiled for."""
    import numpy as np

    from fastmatch.assignment import CandidateLists, DenseShortlists, FactorCost, solve, solve_batched

    g = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        plain = g.standard_normal((UNITS, UNITS)).astype(dtype)
        products = np.multiply.outer(g.random(UNITS), g.random(UNITS)).astype(dtype)
        copies = plain[np.arange(UNITS) // 4]
        forbidden = np.where(g.random(plain.shape) < 0.5, np.inf, plain)
        whole = g.integers(9, size=plain.shape).astype(dtype)
        huge = np.where(forbidden < np.inf, plain, np.finfo(dtype).max).astype(dtype)
        squares = plain, products, copies, copies.T.copy(), forbidden, huge, whole
        for matrix in (*squares, plain[:, : UNITS // 2], plain[: UNITS - 1]):
            yield partial(solve, matrix)
            yield partial(solve, matrix, solver=DenseShortlists())
        yield partial(solve_batched, plain.reshape(-1, 16, 16))
        units = plain[:, :24]
        for metric in ("dot", "l2", "l1"):
            cost = FactorCost([(units, units[::-1])], metric)
            yield partial(solve, cost, maximize=metric == "dot", solver=CandidateLists())
            yield partial(solve, cost, maximize=metric == "dot")


def _merges() -> Iterator[Callable[[], Any]]:
    """Yield permutations and means of tensors, of two and of three, which networks need where tensors are large."""
    import torch

    from fastmatch_kernels import ops

    order = torch.arange(UNITS).flip(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for size in (UNITS, 2048):  # the second is stored past the caches
            tensor = torch.randn(UNITS, size).to(dtype)
            yield partial(ops.permute_merge, [tensor, tensor], [0.5, 0.5])
            yield partial(ops.permute_merge, [tensor] * 3, [0.2, 0.3, 0.5])
            columns = torch.arange(size).flip(0)
            yield partial(ops.permute_merge, [tensor], [1.0], [order], [columns])
            yield partial(ops.permute_merge, [tensor, tensor], [0.5, 0.5], [None, order], [None, columns])


def _networks() -> Iterator[Callable[[], Any]]:
    """Yield alignments, merges and renormalizations of networks with linear, convolutional and normalization layers."""
    import torch
    from torch import nn

    from fastmatch.matching.activations import ActivationMatching
    from fastmatch.matching.align import align
    from fastmatch.matching.weights import WeightMatching
    from fastmatch.merging.average import merge
    from fastmatch.renorm import renormalize

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, UNITS, 3), nn.BatchNorm2d(UNITS), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * UNITS, UNITS), nn.ReLU(), nn.Linear(UNITS, 10),
        ).eval()  # fmt: skip

    def run(dtype: torch.dtype, by_activations: bool) -> None:
        a, b = network().to(dtype), network().to(dtype)
        data = [torch.randn(8, 3, 8, 8, dtype=dtype) for _ in range(2)]
        matcher = ActivationMatching(data) if by_activations else WeightMatching()
        endpoints = [a, align(a, b, data[0], matcher, verify=False).apply(b)]
        merged = merge(endpoints)
        for method in ("repair", "reset"):
            renormalize(merged, endpoints, data, method)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        yield from (partial(run, dtype, by_activations) for by_activations in (False, True))
