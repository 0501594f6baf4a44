"""How similar the units of two models are on data: both models run once, moments are added up at the chosen sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from fastmatch._internal.allowed import Similarity
from fastmatch._internal.batches import Forward, evaluating
from fastmatch._internal.ranks import Ranks
from fastmatch._internal.tree import MergeTree
from fastmatch.matching.batch_pearson import BatchPearson
from fastmatch.matching.cca import WhitenedCovariance
from fastmatch.matching.sites import Reading, unit_columns
from fastmatch.spec import ActivationSite, PermutationSpec
from fastmatch.spec.activation_sites import Site, SiteReader
from fastmatch.statistics.moments import CrossMoments, PooledSimilarity

__all__ = ["Similarity", "measure_similarities"]

Moments: TypeAlias = CrossMoments | BatchPearson | WhitenedCovariance

Measured: TypeAlias = dict[Reading, Moments]

Shared: TypeAlias = tuple[Ranks, int]
"""The ranks that share data, and the number of the data's blocks."""

ACCUMULATORS: dict[str, Callable[[], Moments]] = {
    "batch-correlation": BatchPearson,
    "cca": WhitenedCovariance,
}
"""What adds up the batches for the similarities that are not of pooled moments."""


# parameters: those of activation matching, the models and the ranks
def measure_similarities(
    models: tuple[nn.Module, nn.Module],
    spec: PermutationSpec,
    readings: dict[tuple[str, ...], list[Reading]],
    similarity: Similarity,
    site: Site,
    batches: Iterable[Any],
    forward: Forward,
    shared: Shared | None = None,
) -> dict[tuple[str, ...], torch.Tensor]:
    """Return, for the keys of ``readings``, the (size, size) float64 similarity of A's units (rows) to B's.

    Args:
        models: A and B; both are run on every batch.
        spec: which axes move together.
        readings: what to read for each group or kind of subgroup; the similarities of several readings are added.
        similarity: how two units are compared.
        site: read before or after the nonlinearity.
        batches: what the models are run on, read once.
        forward: how to run a model on a batch.
        shared: the ranks that share the batches, and the number of blocks. ``batches`` are then this rank's, each with
            the number of its block, and the moments of the blocks are merged in a fixed tree.

    Raises:
        ValueError: activations hold NaN or infinity, or no batch reaches where a group is read; the group is named.
    """
    kind = ACCUMULATORS.get(similarity, CrossMoments)
    sites = [reading for found in readings.values() for reading in found]
    reached: list[set[ActivationSite]] = [set(), set()]

    def measure(part: Iterable[Any]) -> Measured:
        moments = {reading: kind() for reading in sites}
        reader = _PairReader(spec, moments)
        for batch in part:
            reader.kept.clear()
            for k, receive in enumerate((reader.keep, reader.compare)):
                with SiteReader(reader.sites, receive, models[k], site=site) as found:
                    forward(models[k], batch)
                reached[k] |= found.reached
        return moments

    with evaluating(*models):
        moments = measure(batches) if shared is None else _merged(shared, batches, sites, measure, reached)
    gains = {}
    for names, found in readings.items():
        _check_reached(names[0], found, reached)
        gain = torch.stack([_similarity(moments[r], similarity) for r in found]).sum(dim=0)
        if not bool(torch.isfinite(gain).all()):
            raise ValueError(
                f"data: activations of group {names[0]!r} hold NaN or infinity; look for them in the inputs, "
                "or for overflow in the models"
            )
        gains[names] = gain
    return gains


def _merged(
    shared: Shared,
    batches: Iterable[tuple[int, Any]],
    sites: list[Reading],
    measure: Callable[..., Measured],
    reached: list[set[ActivationSite]],
) -> Measured:
    """The moments of all blocks, in the host's memory, on all ranks; ``reached`` takes in what other ranks reached."""
    ranks, blocks = shared

    def merge(first: list[Any], second: list[Any]) -> list[Any]:
        return [x.merge(y) for x, y in zip(first, second, strict=True)]

    tree: MergeTree[list[Any]] = MergeTree(ranks, blocks, merge)
    for block, numbered in groupby(batches, key=itemgetter(0)):
        found = measure(batch for _, batch in numbered)
        tree.add(block, [found[reading].on_host() for reading in sites])
    # An error of a rank is told here, before any waits for its moments.
    for theirs in ranks.exchange(reached, "the end of the activations"):
        for mine, found_there in zip(reached, theirs, strict=True):
            mine |= found_there
    return dict(zip(sites, tree.root(), strict=True))


def _check_reached(group: str, readings: Iterable[Reading], reached: list[set[ActivationSite]]) -> None:
    """Raise ValueError if no batch reached the place where a group is read."""
    for reading in readings:
        for side, found in zip("AB", reached, strict=True):
            if reading[0] not in found:
                where = " after ".join(filter(None, [reading[0].op_name, reading[0].weight]))
                raise ValueError(
                    f"data: no batch reaches {where} of model {side}, where group {group!r} was read on the example; "
                    "trace the model on inputs like the data"
                )


def _similarity(moments: Moments, kind: Similarity) -> torch.Tensor:
    if isinstance(moments, CrossMoments):
        return moments.similarity(cast(PooledSimilarity, kind))
    return moments.similarity()


class _PairReader:
    """Keeps A's activations of a batch until B's come, then adds both to the moments."""

    def __init__(self, spec: PermutationSpec, moments: dict[Reading, Moments]) -> None:
        self.spec, self.moments = spec, moments
        self.readings = {reading[0]: reading for reading in moments}
        self.sites = list(self.readings)  # all sites of a reading are in the same tensor
        self.kept: dict[ActivationSite, torch.Tensor] = {}

    def keep(self, site: ActivationSite, tensor: torch.Tensor) -> None:
        """Take A's activations."""
        values, _ = self._values(site, tensor, copy=True)
        self.kept[site] = values

    def compare(self, site: ActivationSite, tensor: torch.Tensor) -> None:
        """Take B's activations of the same batch."""
        a = self.kept.pop(site, None)
        if a is None:  # on this batch A took another path
            return
        b, dim = self._values(site, tensor, copy=False)
        moments = self.moments[self.readings[site]]
        if isinstance(moments, CrossMoments):
            moments.update(a, b, dim)
        else:
            moments.update(a, b)

    def _values(self, site: ActivationSite, tensor: torch.Tensor, *, copy: bool) -> tuple[torch.Tensor, int]:
        """The activations and the dimension of their units; ``copy`` if they are kept while a network goes on."""
        reading, size = self.readings[site], self.spec.groups[site.group].size
        is_single = isinstance(self.moments[reading], CrossMoments) and len(reading) == 1 and tensor.ndim > 1
        if is_single and site.axis.is_whole(size, tensor.shape[site.axis.dim]):
            # The pooled moments read any strides: a copy into rows would take longer than the sums.
            return tensor.detach().clone() if copy else tensor.detach(), site.axis.dim
        parts = [unit_columns(tensor, s.axis, self.spec.groups[s.group].size) for s in reading]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], 1
