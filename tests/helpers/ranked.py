"""Run a function, or a command, on several ranks: processes joined by gloo.

Ranks are forked from a server that has loaded torch and transformers, because that takes each of them five seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["CommandOnRanks", "on_ranks"]


def _processes() -> Any:
    """Return the context whose processes are forked from a server."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "transformers.models.llama.modeling_llama"])
    return context


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
    context = _processes()
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


def _run_command(
    function: Callable[..., int], args: tuple[Any, ...], environment: dict[str, str], errors: Path
) -> None:
    """Be a rank: a process of its own, with the signals of a foreground job, whose status a function returns."""
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    with open(os.devnull, "w") as nothing, open(errors, "w") as said:
        os.dup2(nothing.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


class CommandOnRanks:
    """Processes that are the ranks of a command, as a launcher starts them: ``function(*args)`` returns its status.

    Args:
        folder: Where the ranks' standard errors are kept.
        size: Number of ranks.
        timeout: Seconds that ranks wait for each other.
        started: Ranks that start; all of them if it is None.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        function: Callable[..., int],
        *args: Any,
        timeout: int,
        started: int | None = None,
    ) -> None:
        environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"FASTMATCH_TIMEOUT": str(timeout), "MASTER_PORT": str(_free_port())}
        context, count = _processes(), size if started is None else started
        self.errors = [folder / f"errors.{environment['MASTER_PORT']}.{rank}" for rank in range(count)]
        self.ranks = [
            context.Process(
                target=_run_command, args=(function, args, environment | {"RANK": str(rank)}, said)
            )
            for rank, said in enumerate(self.errors)
        ]
        for rank in self.ranks:
            rank.start()

    def end(self, stopped: Collection[int] = ()) -> dict[int, str]:
        """Wait for all ranks but those that are stopped, and return what each wrote to standard error."""
        for number, rank in enumerate(self.ranks):
            if number not in stopped:
                rank.join(600)
        for number in stopped:
            self.ranks[number].kill()
            self.ranks[number].join()
        self.status = [rank.exitcode for rank in self.ranks]
        return {r: said.read_text() for r, said in enumerate(self.errors) if r not in stopped}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
