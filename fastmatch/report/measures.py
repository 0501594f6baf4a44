"""How similar matched units are, layer by layer: by their weights, and by their activations on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward
from fastmatch._internal.states import State, headers_of
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.gains import unit_rows
from fastmatch.matching.objective import included
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import PermutationSpec

__all__ = ["Layer", "Pair", "activation_pairs", "families", "layers_of", "weight_pairs"]

SHOWN_UNITS = 64
"""Units of a group in a picture of its similarities; of larger groups, evenly spaced ones."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The similarity of a group's units to their partners, before and after the alignment.

    Attributes:
        before: (size,) of A's unit i and B's unit i.
        after: (size,) of A's unit i and the unit of B that was matched to it.
        blocks: (shown, shown) similarities of some units of A to their partners in B, before and after; None if they
            were not measured.
    """

    before: torch.Tensor
    after: torch.Tensor
    blocks: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Layer:
    """One row of the table of layers.

    Attributes:
        name: of the group, or of its subgroups of one kind.
        units: how many.
        before, after: mean similarity of matched units; None if the group has no weights or no activations.
        low, high: the range of nine tenths of the units after the alignment.
        moved: share of the units that changed their place.
        gap: (gap, gap_bound) of the assignment; None if unknown.
    """

    name: str
    units: int
    before: float | None
    after: float | None
    low: float | None
    high: float | None
    moved: float | None = None
    gap: tuple[float, float] | None = None


def families(spec: PermutationSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (name to show, groups): a group by itself, or the subgroups of one kind together."""
    inner: dict[str, list[tuple[str, ...]]] = {}
    for (outer, _), names in spec.subgroups().items():
        inner.setdefault(outer, []).append(names)
    for name in spec.top_level():
        yield name, (name,)
        for names in inner.get(name, ()):
            yield f"{names[0].rsplit('[', 1)[0]}, inside each unit", names


def weight_pairs(a: State, b: State, alignment: Alignment) -> dict[str, Pair]:
    """Return for each group the cosine of matched units' weights, over all tensors that carry the units.

    Only matrices and kernels count: biases and norm scales are alike in most networks and would hide the rest. Every
    tensor is read once, so the states may be on disk.
    """
    spec = alignment.spec
    sums = {name: _Cosines(group.size, alignment.permutations[name]) for name, group in spec.groups.items()}
    headers, other = headers_of(a), headers_of(b)
    for name in headers:
        axes = spec.axes_of(name)
        if (
            not axes
            or not included(name, headers[name], "weights")
            or headers[name].shape != other[name].shape
        ):
            continue
        old, new = a[name], b[name]
        moved = permute_tensor(new, name, spec, alignment.permutations)
        for axis, group in axes:
            size = spec.groups[group].size
            sums[group].add(*(unit_rows(tensor, axis, size, torch.float32) for tensor in (old, new, moved)))
    return {name: found.pair() for name, found in sums.items() if found.is_measured}


class _Cosines:
    """Inner products and norms of a group's units, summed over tensors."""

    def __init__(self, size: int, permutation: torch.Tensor) -> None:
        zeros = torch.zeros(3, size, dtype=torch.float64, device="cpu")
        self.before, self.after, self.norm_a = zeros
        self.norm_b, self.norm_moved = torch.zeros(2, size, dtype=torch.float64, device="cpu")
        self.shown = _evenly_spaced(size)
        block = torch.zeros(2, len(self.shown), len(self.shown), dtype=torch.float64, device="cpu")
        self.block_before, self.block_after = block
        self.is_measured = False

    def add(self, a: torch.Tensor, b: torch.Tensor, moved: torch.Tensor) -> None:
        """Add (units, features) rows of A, of B, and of the aligned B."""
        a, b, moved = (x.cpu() for x in (a, b, moved))
        self.before += (a * b).sum(1, dtype=torch.float64)
        self.after += (a * moved).sum(1, dtype=torch.float64)
        self.norm_a += a.square().sum(1, dtype=torch.float64)
        self.norm_b += b.square().sum(1, dtype=torch.float64)
        self.norm_moved += moved.square().sum(1, dtype=torch.float64)
        some = a[self.shown]
        self.block_before += (some @ b[self.shown].T).double()
        self.block_after += (some @ moved[self.shown].T).double()
        self.is_measured = True

    def pair(self) -> Pair:
        """Return the cosines; a unit without weights has similarity 0."""

        def over(value: torch.Tensor, *norms: torch.Tensor) -> torch.Tensor:
            scale = torch.stack([n.clamp_min(1e-300).sqrt() for n in torch.broadcast_tensors(*norms)]).prod(0)
            return value / scale

        rows = self.norm_a[self.shown, None]
        blocks = (
            over(self.block_before, rows, self.norm_b[self.shown]),
            over(self.block_after, rows, self.norm_moved[self.shown]),
        )
        before = over(self.before, self.norm_a, self.norm_b)
        return Pair(before, over(self.after, self.norm_a, self.norm_moved), blocks)


def activation_pairs(
    models: tuple[nn.Module, nn.Module],
    alignment: Alignment,
    data: Iterable[Any],
    forward: Forward,
    progress: bool | None,
) -> dict[str, Pair]:
    """Return for each group the correlation of matched units' activations on data, after the nonlinearity.

    Groups without a place where activations of the same samples can be read are left out. The data is read twice.
    """
    spec = alignment.spec.flat()
    read = {site.group for site in spec.sites if not site.chosen}
    spec = spec.select([name for name in spec.groups if name in read])
    if not spec.groups:
        return {}
    matcher = ActivationMatching(data, forward=forward)
    model_a, model_b = models
    before, after = (
        matcher.similarities(model_a, other, spec, progress=progress)
        for other in (model_b, alignment.apply(model_b))
    )
    pairs = {}
    for name in before:
        shown = _evenly_spaced(len(before[name]))
        blocks = before[name][shown][:, shown].cpu(), after[name][shown][:, shown].cpu()
        pairs[name] = Pair(before[name].diagonal().cpu(), after[name].diagonal().cpu(), blocks)
    return pairs


def _evenly_spaced(size: int) -> torch.Tensor:
    count = min(size, SHOWN_UNITS)
    return torch.arange(count, device="cpu") * size // max(count, 1)


def layers_of(alignment: Alignment, pairs: Mapping[str, Pair]) -> list[Layer]:
    """Return a row for each group, and one for all subgroups of a kind."""
    gaps = {} if alignment.matching is None else alignment.matching.gaps
    rows = []
    for title, names in families(alignment.spec):
        permutations = [alignment.permutations[name] for name in names]
        moved = sum(int((p != torch.arange(len(p), device="cpu")).sum()) for p in permutations)
        units = sum(map(len, permutations))
        found = [pairs[name] for name in names if name in pairs]
        gap = gaps.get(names[0]) if len(names) == 1 else None
        if not found:
            rows.append(Layer(title, units, None, None, None, None, moved / units, gap))
            continue
        after = torch.cat([pair.after for pair in found]).double()
        low, high = torch.quantile(
            after[:: max(1, len(after) // 100_000)], after.new_tensor([0.05, 0.95])
        ).tolist()
        before = float(torch.cat([pair.before for pair in found]).double().mean())
        rows.append(Layer(title, units, before, float(after.mean()), low, high, moved / units, gap))
    return rows
