"""Data that ranks read together: the batches do not depend on the number of ranks, and each rank reads some of them.

A :class:`torch.utils.data.DistributedSampler` deals out single samples, so its batches are others for every number of
ranks, and sums over them have other last bits. Here the order of its samples is kept, whole batches are made of it, and
consecutive batches are blocks. Blocks are dealt to ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from fastmatch._internal.divided import divided_name, division_of
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.ranks import Ranks, current

__all__ = [
    "BLOCKS",
    "Share",
    "batches_of_rank",
    "checksum",
    "owner_of",
    "read_alike",
    "read_in_step",
    "runs_alone",
    "share_of_rank",
    "whole_data",
]

BLOCKS = 64
"""The number of blocks, or of batches if there are fewer. No more ranks than blocks have data to read."""

COPIED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
)
"""What a loader of some of the batches takes from the loader of all."""


def owner_of(block: int, blocks: int, ranks: int) -> int:
    """Return the rank that reads a block: each rank reads consecutive ones."""
    return block * ranks // blocks


def can_share(data: Iterable[Any]) -> bool:
    """Return whether the number of batches is known, so that ranks can share them."""
    if isinstance(data, DataLoader):
        return data.batch_sampler is not None and _has_length(data)
    return isinstance(data, Collection)


def runs_alone(model: nn.Module) -> bool:
    """Return whether a rank can run a model without the others: nothing is gathered or broadcast in a forward pass."""
    wraps = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    return not wraps and division_of(model) is None and divided_name(model) is None


def whole_data(data: Iterable[Any]) -> Iterable[Any]:
    """Return a loader of all samples for one of a rank's samples; other data as they are."""
    if not isinstance(data, DataLoader) or not isinstance(data.sampler, DistributedSampler):
        return data
    return _loader(data, _batches(data))


class Share(NamedTuple):
    """The batches that one of several ranks reads.

    Attributes:
        ranks: the processes.
        blocks: the number of blocks of all ranks.
        batches: this rank's batches, each with the number of its block.
        first: the number of this rank's first batch among those of all ranks.
    """

    ranks: Ranks
    blocks: int
    batches: Iterator[tuple[int, Any]]
    first: int

    def by_block(self, title: str, progress: bool | None) -> Iterator[tuple[int, Iterator[Any]]]:
        """Yield each block of this rank with its batches, under a progress bar."""
        shown = progress_bar(self.batches, title, show=progress)
        for block, numbered in groupby(shown, key=itemgetter(0)):
            yield block, (batch for _, batch in numbered)


def share_of_rank(data: Iterable[Any], *models: nn.Module) -> Share | None:
    """Return the share of this process; None if it reads all: there are no ranks, or they cannot share these data or models."""
    ranks = current()
    if ranks.is_group and can_share(data) and all(map(runs_alone, models)):
        return batches_of_rank(data, ranks)
    return None


def read_in_step(batches: Iterable[Any], *models: nn.Module) -> Iterable[Any]:
    """Return batches that ranks run together where one of the models needs that, as :func:`read_alike` does; else as they are."""
    ranks = current()
    return batches if all(map(runs_alone, models)) else read_alike(batches, ranks, *models)


def read_alike(batches: Iterable[Any], ranks: Ranks, *models: nn.Module) -> Iterator[Any]:
    """Yield batches that every rank reads, and check at the end that all have read the same ones.

    Where ranks have to run one of ``models`` together, each batch is compared before it is run: a rank that has one more
    than another would wait for it in the forward pass.

    Raises:
        ValueError: a rank has read others.
    """
    in_step = not all(map(runs_alone, models))
    mark = count = 0
    for batch in batches:
        if ranks.size > 1:
            mark, count = checksum(batch, mark), count + 1
            if in_step:
                _check_marks(ranks, (count, mark))
        yield batch
    _check_marks(ranks, (count, mark))


def batches_of_rank(data: Iterable[Any], ranks: Ranks) -> Share:
    """Return this rank's share of the batches.

    Args:
        data: a loader with a sampler, of which each rank loads its batches only, in the order that rank 0 draws; or
            a list, a tuple or another collection of batches that is the same on all ranks.
        ranks: the processes.

    Raises:
        TypeError: the number of batches of ``data`` is not known.
        ValueError: the batches are not the same on all ranks, or there are none.
    """
    if isinstance(data, DataLoader) and can_share(data):
        size = len(data.dataset)  # type: ignore[arg-type]
        batches = ranks.broadcast(lambda: _batches(data), f"a loader of {size} samples")
        numbers = _numbers(len(batches))
        mine = [
            k for k, block in enumerate(numbers) if owner_of(block, numbers[-1] + 1, ranks.size) == ranks.rank
        ]
        loader = _loader(data, [batches[k] for k in mine]) if mine else ()
        found = zip([numbers[k] for k in mine], loader, strict=True)
        return Share(ranks, numbers[-1] + 1, found, mine[0] if mine else 0)
    if not isinstance(data, Collection):
        raise TypeError(
            f"data: ranks share batches whose number is known; got {type(data).__name__}: give a list, or a DataLoader "
            "of a data set with a length"
        )
    numbers = _numbers(len(data))
    blocks = numbers[-1] + 1
    first = next(
        (k for k, block in enumerate(numbers) if owner_of(block, blocks, ranks.size) == ranks.rank), 0
    )
    return Share(ranks, blocks, _checked(data, numbers, ranks), first)


def _numbers(batches: int) -> list[int]:
    """The block of each batch."""
    if not batches:
        raise ValueError("data: yielded no batch")
    blocks = min(batches, BLOCKS)
    return [k * blocks // batches for k in range(batches)]


def _has_length(data: DataLoader[Any]) -> bool:
    return not isinstance(data.dataset, IterableDataset) and hasattr(data.dataset, "__len__")


def _batches(data: DataLoader[Any]) -> list[Any]:
    """The indices of all batches; those of all ranks if the sampler draws those of one."""
    sampler = data.sampler
    if not isinstance(sampler, DistributedSampler):
        return list(data.batch_sampler or ())
    every = DistributedSampler(
        sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed, drop_last=False
    )
    every.set_epoch(sampler.epoch)
    return list(BatchSampler(every, data.batch_size or 1, data.drop_last))


def _loader(data: DataLoader[Any], batches: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(data.dataset, batch_sampler=batches, **{name: getattr(data, name) for name in COPIED})  # type: ignore[arg-type]


def _checked(data: Collection[Any], numbers: list[int], ranks: Ranks) -> Iterator[tuple[int, Any]]:
    """Yield this rank's batches of a collection, and check that all ranks have the same collection."""
    mark, blocks = 0, numbers[-1] + 1
    for block, batch in zip(numbers, data, strict=True):
        mark = checksum(batch, mark)
        if owner_of(block, blocks, ranks.size) == ranks.rank:
            yield block, batch
    _check_marks(ranks, (len(numbers), mark))


def _check_marks(ranks: Ranks, mark: tuple[int, int]) -> None:
    """Compare the number and the checksum of the batches of all ranks."""
    marks = ranks.exchange(mark, "the batches of the data")
    other = next((rank for rank, found in enumerate(marks) if found != marks[0]), None)
    if other is not None:
        raise ValueError(
            f"data: ranks 0 and {other} do not read the same batches (rank 0 has {marks[0][0]} so far, rank {other} {marks[other][0]}); "
            "give every rank the same ones, or a DataLoader, "
            "whose order rank 0 draws for all"
        )


def checksum(batch: Any, mark: int = 0) -> int:
    """Return a checksum of the tensors of a batch, which goes on from ``mark``."""
    if isinstance(batch, torch.Tensor):
        mark = zlib.crc32(repr((batch.dtype, tuple(batch.shape))).encode(), mark)
        if not batch.numel():
            return mark
        return zlib.crc32(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, mark)
    parts = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    for part in parts:
        mark = checksum(part, mark)
    return mark
