"""Run a function on several ranks: processes joined by gloo."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def _run(
    rank: int, folder: Path, sizes: Sequence[int], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["FASTMATCH_TIMEOUT"] = "60"
    torch.set_num_threads(1)
    for size in sizes:
        if rank >= size:
            continue
        store = f"file://{folder}/store{size}"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        try:
            result = function(*args)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"result{size}.{rank}")
        dist.destroy_process_group()


def on_ranks(
    folder: Path, sizes: Sequence[int], function: Callable[..., Any], *args: Any
) -> dict[int, list[Any]]:
    """Return number of ranks -> what ``function(*args)`` returns on each rank; the text of an error if it fails.

    The same processes form a group of each size in turn, because the start of a process takes longer than these tests.
    """
    context = mp.get_context("spawn")
    workers = [
        context.Process(target=_run, args=(rank, folder, sizes, function, args)) for rank in range(max(sizes))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not any(worker.exitcode for worker in workers)
    return {
        size: [torch.load(folder / f"result{size}.{rank}", weights_only=False) for rank in range(size)]
        for size in sizes
    }
