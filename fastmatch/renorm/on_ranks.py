"""Statistics of endpoints that several ranks measure together, each on its share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fastmatch._internal.shared_data import Share
from fastmatch._internal.tree import MergeTree
from fastmatch.renorm.probes import ProbeRecorder, kept_of
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
        recorder: of outputs, to which ``run`` adds.
        run: runs the endpoints on one batch.
        check: raises an error if this rank's activations are not finite.
        device: where the moments belong.
        progress: show a progress bar; None shows it on a terminal.
    """
    tree: MergeTree[list[Table]] = MergeTree(share.ranks, share.blocks, _merged)
    for block, batches in share.by_block("endpoint statistics", progress):
        for batch in batches:
            run(batch)
        tree.add(block, [{name: [m.to("cpu") for m in calls] for name, calls in t.items()} for t in tables])
        for table in tables:
            table.clear()
    check()
    _exchange_probes(share, recorder)
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


def _exchange_probes(share: Share, recorder: ProbeRecorder) -> None:
    """Leave in ``recorder`` what is kept of the batches of all ranks. A rank has kept all that may be."""
    sizes = {
        n: size
        for part in share.ranks.exchange(recorder.sizes(), "the sizes of outputs")
        for n, size in part.items()
    }
    kept = set(kept_of(sizes))
    mine = {number: probe for number, probe in recorder.kept.items() if number in kept}
    found = share.ranks.exchange(mine, "outputs on some samples")
    recorder.kept = {number: probe for part in found for number, probe in part.items()}
