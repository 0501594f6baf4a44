"""``fastmatch warm-up``: compile the kernels that a first alignment would compile."""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from fastmatch.assignment import DenseShortlists, solve, solve_batched
from fastmatch.cli.options import Commands, add_command
from fastmatch.cli.outputs import say
from fastmatch_kernels import inner_product, ops

__all__ = ["add_commands"]


def add_commands(commands: Commands) -> None:
    """Add the command to the grammar."""
    add_command(commands, "warm-up", warm_up_command, examples=("warm-up",))


def warm_up_command(args: argparse.Namespace) -> None:
    """Run every kernel of the CPU once on the types that alignments use, and say where they are kept."""
    from fastmatch_kernels._numba.cache import folders

    begin = time.perf_counter()
    compile_kernels()
    kept = str(folders()[0]) if folders() else None
    seconds = time.perf_counter() - begin
    say(
        args,
        f"kernels are ready after {seconds:.1f} s; they are kept in {kept}",
        seconds=seconds,
        folder=kept,
    )


def compile_kernels() -> None:
    """Compile what is not compiled yet: solvers, inner products, merges and moments."""
    generator = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        crowded = np.tile(generator.standard_normal((1, 60)), (60, 1)).astype(dtype)
        crowded += 1e-3 * generator.standard_normal((60, 60)).astype(dtype)
        for cost in (crowded[:20, :20].copy(), crowded):
            solve(cost, warm_start=solve(cost))
            solve(cost, solver=DenseShortlists())
        solve_batched(crowded[None])
    shape = 2, inner_product.SMALL
    order, weights = {0: torch.tensor([1, 0])}, torch.ones(shape)
    inner_product.inner(weights, weights, order)
    inner_product.change_of_inner(weights, weights, order, {})
    for weight in (
        torch.ones(4, 4),
        torch.ones(4, 4, dtype=torch.bfloat16),
        torch.ones(4, 4, dtype=torch.float16),
    ):
        index = torch.arange(4)
        for rows, columns in ((None, None), (index, None), (None, index), (index, index)):
            ops.permute_merge([weight, weight], [0.5, 0.5], [None, rows], [None, columns])
            ops.permute_merge([weight], [1.0], [rows], [columns])
    ops.moments(torch.randn(4096, 8), torch.randn(4096, 8))
