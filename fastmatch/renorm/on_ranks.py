"""Statistics of endpoints that several ranks measure together, each on its share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fastmatch._internal.shared_data import Share
from fastmatch._internal.tree import MergeTree
from fastmatch.renorm.outputs import SAMPLES, Probe, ProbeRecorder
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["measured_on_ranks"]

Table: TypeAlias = dict[str, list[ChannelMoments]]
"""Layer name -> the moments of its first, second, ... call, of one endpoint."""


# parameters: what is measured, what measures it, and progress
def measured_on_ranks(
    share: Share,
    tables: Sequence[Table],
    recorder: ProbeRecorder,
    run: Callable[[Any], None],
    check: Callable[[], None],
    device: torch.device,
    progress: bool | None,
) -> None:
    """Run this rank's batches, and leave in ``tables`` and ``recorder`` what all ranks have found.

    Args:
        share: the batches.
        tables: one for each endpoint, to which ``run`` adds.
        recorder: of the outputs on the first samples, to which ``run`` adds.
        run: runs the endpoints on one batch.
        check: raises an error if this rank's activations are not finite.
        device: where the moments belong.
        progress: show a progress bar; None shows it on a terminal.
    """
    tree: MergeTree[list[Table]] = MergeTree(share.ranks, share.blocks, _merged)
    probes: list[tuple[int, Probe]] = []
    for block, batches in share.by_block("endpoint statistics", progress):
        for batch in batches:
            before = len(recorder.probes)
            run(batch)
            probes += [(block, probe) for probe in recorder.probes[before:]]
        tree.add(block, [{name: [m.to("cpu") for m in calls] for name, calls in t.items()} for t in tables])
        for table in tables:
            table.clear()
    check()
    recorder.probes = _first_probes(share, probes)
    for table, found in zip(tables, tree.root(), strict=True):
        table |= {name: [m.to(device) for m in calls] for name, calls in found.items()}


def _merged(first: list[Table], second: list[Table]) -> list[Table]:
    for one, two in zip(first, second, strict=True):
        for name, calls in two.items():
            mine = one.setdefault(name, [])
            mine += [ChannelMoments() for _ in calls[len(mine) :]]
            for moments, other in zip(mine, calls, strict=False):
                moments.merge(other)
    return first


def _first_probes(share: Share, probes: list[tuple[int, Probe]]) -> list[Probe]:
    """Return the probes of the first samples of all ranks. A rank has kept those of its own first samples."""
    sizes = [
        (block, max((len(k) for k in p.outputs if k is not None), default=SAMPLES)) for block, p in probes
    ]
    left, last = SAMPLES, -1
    for block, size in sorted(
        x for part in share.ranks.exchange(sizes, "the sizes of outputs") for x in part
    ):
        if left > 0:
            left, last = left - size, block
    mine = [(block, probe) for block, probe in probes if block <= last]
    found = [x for part in share.ranks.exchange(mine, "outputs on the first samples") for x in part]
    recorder = ProbeRecorder()
    for _, probe in sorted(found, key=lambda x: x[0]):
        recorder.add(probe.batch, probe.outputs)
    return recorder.probes
