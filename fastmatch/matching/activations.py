"""Activation matching: units that fire alike on data (Li et al. 2015; Ainsworth et al. 2022, section 3.1).

Both models are run once over the data; per group the pooled cross moments of their activations give a
similarity matrix, and each group is one independent linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, default_forward, evaluating
from fastmatch._internal.progress import progress_bar
from fastmatch.assignment import linear_sum_assignment
from fastmatch.matching.batch_pearson import BatchPearson
from fastmatch.matching.cca import Canonical
from fastmatch.matching.nested import best_orders
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import ActivationSite, Axis, Permutations, PermutationSpec
from fastmatch.spec.activation_sites import SiteReader
from fastmatch.statistics.moments import SIMILARITIES as POOLED
from fastmatch.statistics.moments import CrossMoments

__all__ = ["READ", "SEVERAL", "SIMILARITIES", "best_permutation", "match_activations", "similarities"]

SIMILARITIES = (*POOLED, "batch-correlation", "cca")
"""How alike two units are: of pooled moments, as published (:class:`BatchPearson`), or whitened (:class:`Canonical`)."""

Reading: TypeAlias = tuple[ActivationSite, ...]
"""Where the activations of a group are read, or of all groups of a family in one tensor."""

Moments: TypeAlias = CrossMoments | BatchPearson | Canonical
OTHERS = {"batch-correlation": BatchPearson, "cca": Canonical}

READ = ("after", "before")
"""Where activations are read: after or before the nonlinearity."""

SEVERAL = ("last", "first", "sum")
"""Which reading counts where a group has several (a residual stream): one of them, or the summed similarity."""


def match_activations(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    similarity: str = "correlation",
    read: str = "after",
    several: str = "last",
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Matching:
    """Finds the permutations of B's hidden units under which they fire most like A's on ``data``.

    Args:
        model_a, model_b: modules of the traced architecture; A is the reference. Left as they are.
        spec: a traced spec (its sites say where to read).
        data: a loader of inputs or (inputs, targets); read once.
        similarity: ``"correlation"`` (Pearson), ``"covariance"`` or ``"inner"`` product, pooled over all
            samples; ``"batch-correlation"`` averages over batches as published code does; ``"cca"`` compares
            what is left once correlations within each network are undone.
        read: ``"after"`` or ``"before"`` the nonlinearity. A group that meets none is read where the next
            layer takes it in (after), or where its own layer puts it out (before).
        several: which reading counts where a group has several, see :data:`SEVERAL`.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.

    Returns:
        A :class:`Matching` whose ``objective`` is the similarity of matched units summed over groups,
        under the identity and under the result.

    Raises:
        ValueError: the spec has no sites for a group, the data yields nothing, or an argument is unknown.

    Memory: per site one n x n float64 matrix and one batch of activations.
    """
    gains = _similarities(
        model_a, model_b, spec, data, similarity=similarity, read=read, several=several, forward=forward,
        progress=progress,
    )  # fmt: skip
    permutations: Permutations = spec.identity()
    families: dict[str, list[tuple[str, ...]]] = {}
    for (outer, _), members in spec.subgroups().items():
        families.setdefault(outer, []).append(members)
    before = after = 0.0
    for name in progress_bar(spec.top_level(), "assignment", show=progress):
        within = [members for members in families.get(name, ()) if members in gains]
        if within:
            units = spec.groups[name].size
            found = [best_orders(gains[members], units) for members in within]
            value = torch.stack([optima for _, optima in found]).sum(dim=0)
            outer = best_permutation(value)
            permutations[name] = outer
            for members, (orders, _) in zip(within, found, strict=True):
                before += float(gains[members].diagonal().sum())
                permutations |= {m: orders[i, outer[i]] for i, m in enumerate(members)}
            after += float(value.gather(1, outer[:, None]).sum())
        else:
            gain = gains[name,]
            permutations[name] = best_permutation(gain)
            before += float(gain.diagonal().sum())
            after += float(gain.cpu().gather(1, permutations[name][:, None]).sum())
    return Matching(permutations, "activations", (before, after), solves=len(gains))


def best_permutation(gain: torch.Tensor) -> torch.Tensor:
    """The permutation of largest gain; of equally good ones, one that leaves more units where they are.

    Units alike in all that was read (dead ones, say) may differ upstream, so that a model matched with itself
    should be left alone. After the assignment, unit i takes its own column where exchanging two loses nothing.
    """
    perm = linear_sum_assignment(gain, maximize=True)[1].cpu()
    matrix, units = gain.cpu(), torch.arange(len(gain))
    owner = perm.argsort()  # who holds the column of unit i

    def loss(i: torch.Tensor) -> torch.Tensor:
        return matrix[i, perm[i]] + matrix[owner[i], i] - matrix[i, i] - matrix[owner[i], perm[i]]

    tolerance = 1e-12 * float(matrix.abs().max()) if len(matrix) else 0.0
    for i in units[(perm != units) & (loss(units) <= tolerance)]:
        if perm[i] != i and loss(i) <= tolerance:
            other, column = owner[i].clone(), perm[i].clone()
            perm[other], owner[column] = column, other
            perm[i], owner[i] = i, i
    return perm


def similarities(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    similarity: str = "correlation",
    read: str = "after",
    several: str = "last",
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Per group the (size, size) float64 similarity of A's units to B's; arguments of :func:`match_activations`.

    Groups that hold others are left out: how alike their units are depends on the order of what lies within.
    """
    gains = _similarities(
        model_a, model_b, spec.flat(), data, similarity=similarity, read=read, several=several, forward=forward,
        progress=progress,
    )  # fmt: skip
    return {name: gain for (name,), gain in gains.items()}


def _similarities(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    similarity: str,
    read: str,
    several: str,
    forward: Forward,
    progress: bool | None,
) -> dict[tuple[str, ...], torch.Tensor]:
    """(group,) or the groups of a family -> the similarity of their units, one group after the other."""
    for name, value, allowed in (
        ("similarity", similarity, SIMILARITIES),
        ("read", read, READ),
        ("several", several, SEVERAL),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
    chosen = _readings(spec, read, several)
    moments: dict[Reading, Moments] = {
        reading: OTHERS.get(similarity, CrossMoments)() for found in chosen.values() for reading in found
    }
    _read_moments(model_a, model_b, spec, moments, read, data, forward, progress)
    gains: dict[tuple[str, ...], torch.Tensor] = {}
    for names, readings in chosen.items():
        gain = torch.stack([_similarity(moments[reading], similarity) for reading in readings]).sum(dim=0)
        if not bool(torch.isfinite(gain).all()):
            raise ValueError(
                f"data: activations of group {names[0]!r} hold NaN or infinity; look for them in the inputs, "
                "or for overflow in the models"
            )
        gains[names] = gain
    return gains


def _readings(spec: PermutationSpec, read: str, several: str) -> dict[tuple[str, ...], list[Reading]]:
    """Where to read each group, and each family of groups that lie within the units of another."""
    families = list(spec.subgroups().items())
    chosen: dict[tuple[str, ...], list[Reading]] = {}
    for _, members in families:
        # Whole heads are compared channel by channel: best where their channels keep their order.
        wide = any(axis.inner > 1 for axis in spec.groups[members[0]].axes)
        try:
            lead = choose_sites(spec, members[0], "before" if wide else read, several)
        except ValueError:  # the rows of an expert are other ones for every token
            continue
        by_place = {(t.group, t.op, t.role, t.operand): t for t in spec.sites if t.group in members}
        chosen[members] = [tuple(by_place[m, t.op, t.role, t.operand] for m in members) for t in lead]
    held = {outer for (outer, _), members in families if members in chosen}
    for name in spec.top_level():
        if name not in held:
            chosen[name,] = [(site,) for site in choose_sites(spec, name, read, several)]
    return chosen


def _similarity(moments: Moments, kind: str) -> torch.Tensor:
    return moments.similarity(kind) if isinstance(moments, CrossMoments) else moments.similarity()


def choose_sites(spec: PermutationSpec, group: str, read: str, several: str) -> list[ActivationSite]:
    """The sites that say how alike the units of one group are."""
    roles = {
        "after": ("activation", "consumed", "produced"),
        "before": ("activation", "produced", "consumed"),
    }
    sites = [t for t in spec.sites if t.group == group]
    for role in roles[read]:
        found = sorted((t for t in sites if t.role == role), key=lambda t: (t.op, t.axis))
        if found:
            return {"last": found[-1:], "first": found[:1], "sum": found}[several]
    raise ValueError(
        f"spec: group {group!r} has no place to read activations from; "
        "trace the spec from the model (PermutationSpec.trace)"
    )


def _read_moments(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    moments: dict[Reading, Moments],
    read: str,
    data: Iterable[Any],
    forward: Forward,
    progress: bool | None,
) -> None:
    """One read of the data with both models; fills ``moments`` at their sites."""
    sites = [reading[0] for reading in moments]  # the others of a family are read from the same tensor
    readings = {reading[0]: reading for reading in moments}
    values_a: dict[ActivationSite, tuple[torch.Tensor, int]] = {}

    def values(site: ActivationSite, tensor: torch.Tensor, *, own: bool) -> tuple[torch.Tensor, int]:
        """(activations, where their units lie); in memory of their own if they are to be kept while a network runs on."""
        reading, size = readings[site], spec.groups[site.group].size
        pooled = isinstance(moments[reading], CrossMoments) and len(reading) == 1 and tensor.ndim > 1
        if pooled and site.axis.is_whole(size, tensor.shape[site.axis.dim]):
            # As they lie in memory: to copy them into rows takes longer than their sums.
            return tensor.detach().clone() if own else tensor.detach(), site.axis.dim
        parts = [unit_rows(tensor, t.axis, spec.groups[t.group].size) for t in reading]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], 1

    def keep(site: ActivationSite, tensor: torch.Tensor) -> None:
        values_a[site] = values(site, tensor, own=True)

    def pair(site: ActivationSite, tensor: torch.Tensor) -> None:
        a, _ = values_a.pop(site)
        b, dim = values(site, tensor, own=False)
        found = moments[readings[site]]
        if isinstance(found, CrossMoments):
            found.update(a, b, dim)
        else:
            found.update(a, b)

    site = "post" if read == "after" else "pre"
    with evaluating(model_a, model_b):
        for batch in batches_of(data, "activation matching", progress=progress):
            with SiteReader(sites, keep, site=site, model=model_a):
                forward(model_a, batch)
            with SiteReader(sites, pair, site=site, model=model_b):
                forward(model_b, batch)


def unit_rows(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """(samples, size): every position of the tensor that is not a unit is a sample.

    Always a copy, since the network may go on to write into ``tensor`` in place.
    """
    rows = axis.slice_of(tensor.detach()).movedim(axis.dim, -1)
    if axis.is_whole(size, rows.shape[-1]):
        rows = rows.reshape(-1, size)
        return (
            rows.clone() if rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else rows
        )
    picked = rows.reshape(-1, rows.shape[-1])[:, axis.positions(size).to(rows.device)]
    return picked.transpose(2, 3).reshape(-1, size)
