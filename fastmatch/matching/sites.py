"""Where the activations of a group are read, and how a tensor of activations becomes samples of units."""

from __future__ import annotations

from typing import TypeAlias

import torch

from fastmatch._internal.allowed import Reduce
from fastmatch.spec import ActivationSite, Axis, PermutationSpec
from fastmatch.spec.activation_sites import Site

__all__ = ["Reading", "Reduce", "choose_readings", "choose_sites", "is_apart", "unit_columns"]

Reading: TypeAlias = tuple[ActivationSite, ...]
"""The sites that are read from one tensor: that of a group, or those of all subgroups of a kind."""

ROLES: dict[Site, tuple[str, ...]] = {
    "post": ("activation", "consumed", "produced"),
    "pre": ("activation", "produced", "consumed"),
}
"""Which role of a site is preferred."""


def choose_sites(spec: PermutationSpec, group: str, site: Site, reduce: Reduce) -> list[ActivationSite]:
    """Return the sites at which the units of one group are compared.

    Raises:
        ValueError: the spec has no site for the group, or none at which two networks have the same samples.
    """
    sites = [s for s in spec.sites if s.group == group and not s.chosen]
    for role in ROLES[site]:
        found = sorted((s for s in sites if s.role == role), key=lambda s: (s.op, s.axis))
        if found:
            return {"last": found[-1:], "first": found[:1], "sum": found}[reduce]
    if is_apart(spec, group):
        raise ValueError(
            f"spec: no operation shows group {group!r} on the same samples in two networks, as experts do not whose tokens a "
            "router chooses; match it by weights (fm.WeightMatching)"
        )
    raise ValueError(
        f"spec: group {group!r} has no place to read activations from; "
        "trace the spec from the model (PermutationSpec.trace)"
    )


def is_apart(spec: PermutationSpec, group: str) -> bool:
    """Whether a traced spec has no place where two networks show a group's units on the same samples."""
    return bool(spec.sites) and not any(s.group == group and not s.chosen for s in spec.sites)


def choose_readings(
    spec: PermutationSpec, site: Site, reduce: Reduce
) -> dict[tuple[str, ...], list[Reading]]:
    """Return (group,), or the subgroups of one kind, -> what to read for them.

    A group whose subgroups are read is not read itself: its units are compared under the best order within them. One that two
    networks do not show on the same samples is left out.
    """
    chosen: dict[tuple[str, ...], list[Reading]] = {}
    outer_groups = set()
    for (outer, _), subgroups in spec.subgroups().items():
        # Whole heads are compared channel by channel. That needs their channels in the order of the layer's output.
        has_blocks = any(axis.inner > 1 for axis in spec.groups[subgroups[0]].axes)
        try:
            first = choose_sites(spec, subgroups[0], "pre" if has_blocks else site, reduce)
        except ValueError:  # the hidden units of an expert: each sees other tokens
            continue
        by_place = {(s.group, s.op, s.role, s.operand): s for s in spec.sites if s.group in subgroups}
        chosen[subgroups] = [tuple(by_place[g, s.op, s.role, s.operand] for g in subgroups) for s in first]
        outer_groups.add(outer)
    for name in spec.top_level():
        if name not in outer_groups and not is_apart(spec, name):
            chosen[name,] = [(found,) for found in choose_sites(spec, name, site, reduce)]
    return chosen


def unit_columns(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """Return the activations as (samples, size): every position of the tensor but the unit's is a sample.

    The result is always a copy, because the network may write into ``tensor`` in place later.
    """
    rows = axis.slice_of(tensor.detach()).movedim(axis.dim, -1)
    if axis.is_whole(size, rows.shape[-1]):
        rows = rows.reshape(-1, size)
        is_view = rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return rows.clone() if is_view else rows
    picked = rows.reshape(-1, rows.shape[-1])[:, axis.positions(size).to(rows.device)]
    return picked.transpose(2, 3).reshape(-1, size)
