"""Run a function on several ranks: processes joined by gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def _run(
    rank: int,
    folder: Path,
    sizes: Sequence[int],
    functions: Sequence[Callable[..., Any]],
    args: tuple[Any, ...],
) -> None:
    os.environ["FASTMATCH_TIMEOUT"] = "300"
    torch.set_num_threads(1)
    for (step, function), size in product(enumerate(functions), sizes):
        if rank >= size:
            continue
        store = f"file://{folder}/store{step}.{size}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=600)
        )
        try:
            result = function(*args)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"result{step}.{size}.{rank}")
        dist.destroy_process_group()


def on_ranks(
    folder: Path, sizes: Sequence[int], functions: Sequence[Callable[..., Any]], *args: Any
) -> list[dict[int, list[Any]]]:
    """Return, for each function, number of ranks -> what ``function(*args)`` returns on each rank.

    The same processes form a group of each size in turn, because the start of a process takes longer than these tests.

    Raises:
        AssertionError: a function failed; the message has its traceback.
    """
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=_run, args=(rank, folder, sizes, functions, args))
        for rank in range(max(sizes))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not any(worker.exitcode for worker in workers)
    results = []
    for step in range(len(functions)):
        found = {
            size: [
                torch.load(folder / f"result{step}.{size}.{rank}", weights_only=False) for rank in range(size)
            ]
            for size in sizes
        }
        for size, values in found.items():
            for rank, value in enumerate(values):
                assert not isinstance(value, str), f"rank {rank} of {size}:\n{value}"
        results.append(found)
    return results
