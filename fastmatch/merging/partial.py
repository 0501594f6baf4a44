"""Merging N models from a layer on, the layers before it kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fastmatch._internal.batches import (
    Forward,
    batches_of,
    check_module,
    default_forward,
    device_of,
    evaluating,
)
from fastmatch._internal.coefficients import check_weights, remember_weights
from fastmatch._internal.modules import copy_module
from fastmatch._internal.states import State, check_finite, check_same_architecture, state_of
from fastmatch.matching.activations import READ, choose_sites, unit_rows
from fastmatch.merging.rewire import Rewiring, rewire
from fastmatch.merging.units import RULES, UnitMaps, identity_maps, maps_by, on_axis
from fastmatch.permutations.verify import in_double, largest_difference, outputs_of
from fastmatch.renorm.statistics import Calls, EndpointStatistics, endpoint_statistics
from fastmatch.spec import ActivationSite, PermutationSpec
from fastmatch.spec.activation_sites import SiteReader
from fastmatch.spec.graph import trace_graph
from fastmatch.spec.trace import arguments_of
from fastmatch.statistics.moments import ChannelMoments, CrossMoments

__all__ = ["PartialMerge", "merge_partial"]

TOLERANCE = 1e-10
"""Largest relative difference between a model and its rewired self in float64."""


@dataclass(frozen=True)
class PartialMerge:
    """A partial merge and how it was made.

    Attributes:
        model: a ``torch.fx.GraphModule`` in eval mode; what is kept apart is ``apart.0``, ``apart.1``, ...,
            the rest ``merged``.
        rule: one of :data:`fastmatch.merging.units.RULES`.
        weights: one a model.
        spec: the groups that were traced.
        apart: names of the parameters that are kept once a model, in ``model``.
        maps: group -> how its units are merged, for the groups that are.
        inputs: the (parameter, dimension) pairs at which units enter.
    """

    model: fx.GraphModule
    rule: str
    weights: tuple[float, ...]
    spec: PermutationSpec
    apart: tuple[str, ...]
    maps: dict[str, UnitMaps]
    inputs: frozenset[tuple[str, int]]

    def endpoint_statistics(
        self, models: Sequence[nn.Module], data: Iterable[Any], *, samples: int | None = None
    ) -> EndpointStatistics:
        """The models' statistics under the names and in the units of the merge, for :func:`fastmatch.renormalize`.

        Example:
            >>> goals = found.endpoint_statistics([model_a, model_b], loader)
            >>> repaired = fm.renormalize(found.model, goals, loader, "repair")

        Layers kept apart have their own statistics as goal. Means go the way of the units, standard deviations
        too: those of a zipped unit are the mean over its members.

        Raises:
            ValueError: another number of models; or the rule mixes units (``"cca"``): the spread of a mixture takes covariances that are
                not kept. ``method="reset"`` needs no endpoints and works.
        """
        if any(maps.spread is None for maps in self.maps.values()):
            raise ValueError(
                f"rule {self.rule!r} mixes units, whose spread takes covariances of layers that are not kept; "
                'renormalize with method="reset", which needs no endpoints, or merge by another rule'
            )
        if len(models) != len(self.weights):
            raise ValueError(f"models: expected the {len(self.weights)} that were merged, got {len(models)}")
        measured = endpoint_statistics(models, data, samples=samples).calls
        known = {name for name, _ in self.model.named_modules()}
        tables: list[dict[str, Calls]] = []
        for k in range(len(measured)):
            table: dict[str, Calls] = {}
            for name in measured[k]:
                if f"merged.{name}" in known:
                    table[f"merged.{name}"] = tuple(self._mapped(name, k, m) for m in measured[k][name])
                for j, own in enumerate(measured):
                    if f"apart.{j}.{name}" in known:
                        table[f"apart.{j}.{name}"] = own[name]
            tables.append(table)
        return EndpointStatistics(tuple(tables))

    def _mapped(self, layer: str, k: int, moments: ChannelMoments) -> ChannelMoments:
        """The moments of model k's layer in merged units."""
        mean, std = moments.mean, moments.variance.sqrt()
        weight = f"{layer}.weight"
        for axis, group in self.spec.axes_of(weight):
            spread = self.maps[group].spread
            if (weight, axis.dim) not in self.inputs and spread is not None:
                along = replace(axis, dim=0)
                size = self.spec.groups[group].size
                mean, std = (on_axis(spread[k], t, along, size) for t in (mean, std))
        return ChannelMoments(moments.count, mean, std.square() * moments.count)


def merge_partial(
    models: Sequence[nn.Module],
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    *,
    rule: str = "permute",
    start_at: str | int = 0,
    apart: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    a: float | None = None,
    b: float = 0.125,
    gamma: float = 0.1,
    read: str = "after",
    forward: Forward = default_forward,
    verify: bool = True,
    progress: bool | None = None,
) -> PartialMerge:
    """Merges N models from ``start_at`` on; the layers before it stay apart, one a model.

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, loader, rule="zip", start_at="features.8")
        >>> logits = found.model(x)

    At the boundary the models' activations are joined in merged units. ``start_at=0`` merges everything:
    with ``rule="permute"`` that is :func:`fastmatch.matching.align` and :func:`fastmatch.merging.average`. ``start_at=len(spec.flat().groups)``
    keeps everything apart and averages the outputs: the ensemble.

    Args:
        models: two or more modules of one architecture that ``torch.fx`` can follow; left as they are.
        example_inputs: a tensor, or a tuple of positional inputs; a batch of 2 is enough.
        data: a loader of inputs or (inputs, targets), read once for all statistics. Not needed by
            ``rule="identity"``, nor where nothing is merged.
        rule: ``"identity"``; ``"permute"`` (by correlation, to the first model); ``"zip"`` (ZipIt, Stoica et al.
            2023: the most similar units become one, within a model too); ``"cca"`` (CCA-Merge, Horoi et al. 2024).
        start_at: a group's name, or its position among ``PermutationSpec.trace(model, x).flat().groups``: what runs
            before the layer that first produces it stays apart.
        apart: names of further groups whose layers stay apart, wherever they are.
        weights: one a model, positive, of sum one; equal ones where left out.
        a, b: of ``"zip"``, see :func:`fastmatch.merging.zip.zip_units`. ``a`` is 0.3 for two models, as
            published, and 1 for more, where a merged pair must stay open to the third model's unit.
        gamma: of ``"cca"``: what is added to the covariances' diagonals, as a share of their mean.
        read: ``"after"`` or ``"before"`` the nonlinearity, as in :func:`fastmatch.matching.align`.
        forward: how to run a model on a batch.
        verify: prove in float64 that the rewired graph with one model's weights everywhere computes that model.
        progress: show a bar; None shows it on a terminal.

    Returns:
        A :class:`PartialMerge`; its ``model`` runs, saves and exports like any module. Batch norm's running
        statistics are only averaged: ``fm.renormalize(found.model, None, loader, "reset")`` measures them.

    Raises:
        ValueError: architectures differ, an argument is out of range, a group is unknown, data is missing, or
            ``torch.fx`` cannot follow the model.
        TypeError: something that is no module.

    Memory: per merged group one (N n, N n) float64 matrix, or to permute N - 1 of (n, n); ``"cca"`` keeps n x n
    maps at the boundary.
    """
    if len(models) < 2:
        raise ValueError(f"models: expected at least two, got {len(models)}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
    if a is None:
        a = 0.3 if len(models) == 2 else 1.0
    if not a > 0:
        raise ValueError(f"a: expected a number above 0, got {a}")
    if not gamma >= 0:
        raise ValueError(f"gamma: expected a number of at least 0, got {gamma}")
    alphas = check_weights(weights, len(models))
    if min(alphas) <= 0 or abs(sum(alphas) - 1) > 1e-6:
        raise ValueError(f"weights: expected positive numbers of sum one, got {alphas}")
    for k, model in enumerate(models):
        check_module(model, f"models[{k}]")
    if read not in READ:
        raise ValueError(f"read: expected one of {READ}, got {read!r}")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    for k, state in enumerate(states):
        check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
        check_finite(state, f"models[{k}]")
    structure = trace_graph(copy_module(models[0]).eval(), example_inputs)
    plan = Rewiring(structure, start_at, apart)
    if verify:
        _verify(plan, example_inputs, alphas)
    graph = structure.module.graph
    device = device_of(structure.module)
    others = (copy_module(m).eval().to(device) for m in models[1:])
    copies = [structure.module, *(fx.GraphModule(model, graph) for model in others)]
    options = {"a": a, "b": b, "gamma": gamma}
    if rule == "identity":
        maps = _identity(plan, alphas)
    elif not plan.joined:
        maps = {}
    elif data is None:
        raise ValueError(f"data: needed by rule {rule!r}, which matches activations")
    else:
        moments = _read_moments(copies, plan, rule, data, read, forward, progress)
        maps = {name: maps_by(rule, found, alphas, **options) for name, found in moments.items()}
    maps = {name: found.to(device, _precise(states[0])) for name, found in maps.items()}
    model = rewire(plan, copies, maps, alphas)
    kept = tuple(name for name, _ in model.named_parameters() if name.startswith("apart."))
    remember_weights(model, alphas)
    return PartialMerge(model, rule, tuple(alphas), structure.spec, kept, maps, structure.inputs)


def _identity(plan: Rewiring, weights: Sequence[float]) -> dict[str, UnitMaps]:
    groups, device = plan.structure.spec.groups, device_of(plan.structure.module)
    return {name: identity_maps(groups[name].size, weights).to(device, torch.float64) for name in plan.joined}


def _precise(state: State) -> torch.dtype:
    """The type of the parameters, float32 at least."""
    first = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    return torch.promote_types(first, torch.float32)


def _verify(plan: Rewiring, example_inputs: Any, weights: Sequence[float]) -> None:
    """ValueError unless the rewired graph, one model's weights everywhere, computes that model in float64."""
    args, kwargs = (in_double(part) for part in arguments_of(example_inputs, None))
    double = copy_module(plan.structure.module).double()
    expected = outputs_of(double, args, kwargs)
    same = rewire(plan, [double] * len(weights), _identity(plan, weights), weights)
    error = largest_difference(expected, outputs_of(same, args, kwargs))
    if not error <= TOLERANCE:
        raise ValueError(
            f"models: rewired, the forward pass of {len(weights)} equal models differs from one model's by "
            f"{error:.2g} relative; something in it depends on what it keeps apart (an operation in place, a value "
            "that is no tensor). Choose another start_at, or pass verify=False to go on without the proof"
        )


def _read_moments(
    copies: Sequence[nn.Module],
    plan: Rewiring,
    rule: str,
    data: Iterable[Any],
    read: str,
    forward: Forward,
    progress: bool | None,
) -> dict[str, list[CrossMoments]]:
    """Per group the moments that the rule asks for, in one read of the data.

    To permute, those of the first model's units with each other's; else one, of all units side by side.
    """
    spec = plan.structure.spec
    chosen = {choose_sites(spec, name, read, "last")[0]: name for name in plan.joined}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in plan.joined}
    count = len(copies) - 1 if rule == "permute" else 1
    moments = {name: [CrossMoments() for _ in range(count)] for name in plan.joined}

    def keep(site: ActivationSite, tensor: torch.Tensor) -> None:
        rows[chosen[site]].append(unit_rows(tensor, site.axis, spec.groups[site.group].size))

    with evaluating(*copies):
        for batch in batches_of(data, "partial merge", progress=progress):
            for copy in copies:
                with SiteReader(chosen, keep, site="post" if read == "after" else "pre"):
                    forward(copy, batch)
            for name, parts in rows.items():
                if rule == "permute":
                    for found, part in zip(moments[name], parts[1:], strict=True):
                        found.update(parts[0], part)
                else:
                    joint = torch.cat([part.to(parts[0].device) for part in parts], dim=1)
                    moments[name][0].update(joint, joint)
                parts.clear()
    for name, found in moments.items():
        if not all(bool(torch.isfinite(v).all()) for m in found for v in m.variance):
            raise ValueError(
                f"data: activations of group {name!r} hold NaN or infinity; look for them in the inputs, "
                "or for overflow in the models"
            )
    return moments
