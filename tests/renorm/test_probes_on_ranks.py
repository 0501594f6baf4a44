"""What is kept of the endpoints' outputs does not depend on the number of ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmatch.renorm.on_ranks import _exchange_probes
from fastmatch.renorm.probes import ProbeRecorder


class Exchange:
    """Gives every thread what all threads bring."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = threading.Barrier(size), [None] * size

    def of(self, rank: int) -> Any:
        def exchange(value: Any, _what: str) -> list[Any]:
            self.brought[rank] = value
            self.barrier.wait(60)
            found = list(self.brought)
            self.barrier.wait(60)
            return found

        return SimpleNamespace(exchange=exchange)


def recorded(sizes: list[int], first: int, stop: int) -> ProbeRecorder:
    recorder = ProbeRecorder()
    recorder.next = first
    for number in range(first, stop):
        rows = torch.stack(
            [torch.full((sizes[number],), float(number)), torch.arange(float(sizes[number]))], dim=1
        )
        recorder.add(rows, [rows])
    return recorder


def kept(recorder: ProbeRecorder) -> list[list[Any]]:
    return [probe.batch.tolist() for probe in recorder.probes()]


@pytest.mark.parametrize("sizes", [[7] * 300, [100] * 40, [30] * 5 + [500] * 9, [3000] * 5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_keep_together_what_one_process_keeps(sizes, count):
    edges = [len(sizes) * rank // count for rank in range(count + 1)]
    exchange = Exchange(count)

    def run(rank: int) -> ProbeRecorder:
        recorder = recorded(sizes, edges[rank], edges[rank + 1])
        _exchange_probes(SimpleNamespace(ranks=exchange.of(rank)), recorder)  # pyright: ignore
        return recorder

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, range(count)))
    alone = kept(recorded(sizes, 0, len(sizes)))
    assert all(kept(recorder) == alone for recorder in found)
