"""Merge N models from a layer on; the layers before it stay apart."""

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
from fastmatch._internal.callers import warn_user
from fastmatch._internal.checks import check_integer
from fastmatch._internal.coefficients import check_weights, remember_weights
from fastmatch._internal.eager import uncompiled
from fastmatch._internal.modules import copy_module
from fastmatch._internal.shared_data import read_in_step
from fastmatch._internal.states import (
    State,
    check_finite,
    check_models,
    check_same_architecture,
    state_of,
    working_dtype,
)
from fastmatch._internal.words import first_of
from fastmatch.matching.sites import choose_sites, is_apart, unit_columns
from fastmatch.merging.rewire import Rewiring, rewire
from fastmatch.merging.unit_rules import Identity, MatchedUnits, RuleName
from fastmatch.merging.units import UnitMaps, identity_maps, on_axis
from fastmatch.permutations.precise import double_copy, in_double, largest_difference, outputs_of
from fastmatch.renorm.endpoints import Calls, EndpointStatistics, endpoint_statistics
from fastmatch.renorm.norms import is_norm
from fastmatch.renorm.probes import Probe
from fastmatch.spec import ActivationSite, PermutationSpec
from fastmatch.spec.activation_sites import SiteReader
from fastmatch.spec.graph import trace_graph
from fastmatch.spec.running import arguments_of
from fastmatch.statistics.moments import ChannelMoments, CrossMoments

__all__ = ["PartialMerge", "merge_partial"]

TOLERANCE = 1e-10
"""Largest relative difference allowed between a model and its rewired graph, in float64."""

TOLERANCE_AS_GIVEN = 1e-3
"""The same in the model's own type, where it does not run in float64."""


@dataclass(frozen=True, eq=False)
class PartialMerge:
    """A partial merge and how it was made.

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Identity(), start_at=1)
        >>> found.rule, len(found.weights)
        ('identity', 2)

    Attributes:
        model: a ``torch.fx.GraphModule`` in eval mode. Layers kept apart are ``apart.0``, ``apart.1``, ...; the
            others are ``merged``.
        rule: ``"identity"``, ``"permute"``, ``"zip"`` or ``"cca"``.
        weights: one per model.
        spec: the groups that were traced.
        apart: names of the parameters in ``model`` that each model keeps.
        maps: group -> how its units are merged, for the groups that are, and for those at a boundary: their layers stay apart, and
            their units are joined where merged layers read them.
        inputs: the (parameter, dimension) pairs at which units enter.
        has_heads: whether the models are apart again at the end (``stop_at``), so that ``model`` returns a tuple of their outputs.
    """

    model: fx.GraphModule
    rule: RuleName
    weights: tuple[float, ...]
    spec: PermutationSpec
    apart: tuple[str, ...]
    maps: dict[str, UnitMaps]
    inputs: frozenset[tuple[str, int]]
    has_heads: bool = False

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the groups of which a layer is merged that gives its units."""
        held = self.model.state_dict().keys()
        made = {
            group: [
                a.parameter for a in self.spec.groups[group].axes if (a.parameter, a.dim) not in self.inputs
            ]
            for group in self.maps
        }
        return tuple(
            group
            for group, names in made.items()
            if not names or any(f"merged.{name}" in held for name in names)
        )

    def __repr__(self) -> str:
        """The rule, the weights, and how many layers are merged and kept apart."""
        own = {name.split(".", 2)[2].rpartition(".")[0] for name in self.apart}
        apart = first_of(sorted(own), 4) if own else "nothing"
        return (
            f"PartialMerge(rule={self.rule!r}, weights={self.weights}, {len(self.merged)} of {len(self.spec.groups)} groups "
            f"merged, apart: {apart})"
        )

    def endpoint_statistics(
        self,
        models: Sequence[nn.Module],
        data: Iterable[Any],
        *,
        only: int | None = None,
        samples: int | None = None,
        forward: Forward = default_forward,
    ) -> EndpointStatistics:
        """Measure the models' statistics, under the names and in the units of the merge.

        The target of a layer kept apart is its own statistics. Means are mapped like units. So are standard
        deviations: that of a zipped unit is the mean over its members.

        Example:
            >>> found = fm.merge_partial([model_a, model_b], x, fm.Zip(loader), start_at=1)
            >>> statistics = found.endpoint_statistics([model_a, model_b], loader)
            >>> repaired = fm.renormalize(found.model, statistics, loader, "repair")

        Args:
            models: those that were merged, in the same order.
            data: a loader of inputs or (inputs, targets); read once.
            only: the position of a model whose statistics alone are the target of merged layers. Then there is one
                endpoint: ``fm.renormalize(found.model, statistics, loader, weights=[1.0])``.
            samples: stop after this many samples; None reads all of them.
            forward: ``forward(model, batch)`` runs a model on a batch.

        Raises:
            ValueError: another number of models; or the rule is ``"cca"``, which mixes units: the standard deviation
                of a mixture needs covariances that are not kept. ``only=0`` works, because the merged units are those of the
                first model. So does ``method="reset"``, which needs no endpoints.
        """
        if only is not None:
            check_integer("only", only)
            if only >= len(self.weights):
                raise ValueError(f"only: expected a position below {len(self.weights)}, got {only}")
        if only != 0 and any(maps.spread is None for maps in self.maps.values()):
            raise ValueError(
                f"rule {self.rule!r} mixes units, whose spread takes covariances of layers that are not kept; "
                'merge by another rule or renormalize with method="reset", which needs no endpoints; or pass only=0 to take the first '
                "model's statistics"
            )
        if len(models) != len(self.weights):
            raise ValueError(f"models: expected the {len(self.weights)} that were merged, got {len(models)}")
        statistics = endpoint_statistics(models, data, samples=samples, forward=forward)
        measured = statistics.calls
        known = {name for name, _ in self.model.named_modules()}
        tables: list[dict[str, Calls]] = []
        for k in range(len(measured)):
            table: dict[str, Calls] = {}
            for name in measured[k]:
                if f"merged.{name}" in known and only in (None, k):
                    table[f"merged.{name}"] = tuple(self._mapped(name, k, m) for m in measured[k][name])
                for j, own in enumerate(measured):
                    if f"apart.{j}.{name}" in known:
                        table[f"apart.{j}.{name}"] = own[name]
            tables.append(table)
        probes = () if self.has_heads else statistics.probes
        if only is None:
            return EndpointStatistics(tuple(tables), probes)
        probes = tuple(Probe(probe.batch, (probe.outputs[only],)) for probe in probes)
        return EndpointStatistics((tables[only],), probes)

    def _mapped(self, layer: str, k: int, moments: ChannelMoments) -> ChannelMoments:
        """Return the moments of model k's layer in merged units."""
        mean, std = moments.mean, moments.variance.sqrt()
        weight = f"{layer}.weight"
        for axis, group in self.spec.axes_of(weight):
            spread = self.maps[group].spread
            if (weight, axis.dim) not in self.inputs and spread is not None:
                along = replace(axis, dim=0)
                size = self.spec.groups[group].size
                mean, std = (on_axis(spread[k], t, along, size) for t in (mean, std))
        return ChannelMoments(moments.count, mean, std.square() * moments.count)


# parameters: the two boundaries, what stays apart between them, and how the rest is merged
def merge_partial(
    models: Sequence[nn.Module],
    example_inputs: Any,
    rule: Identity | MatchedUnits,
    *,
    start_at: str | int = 0,
    stop_at: str | int | None = None,
    apart: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> PartialMerge:
    """Merge N models from ``start_at`` on; each model keeps its own layers before it.

    At the boundary the models' activations are joined in merged units. ``start_at=0`` merges everything: with
    :class:`fastmatch.Permute` that equals :func:`fastmatch.align` by activations and :func:`fastmatch.merge`.
    ``start_at=len(spec.flat().groups)`` keeps everything apart and averages the outputs: the ensemble.

    With ``stop_at`` the models are apart again at the end: networks of different tasks share what lies between, and each
    keeps its own head (ZipIt).

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Zip(loader), start_at=1)
        >>> logits = found.model(x)
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Zip(loader), stop_at=1)
        >>> logits_a, logits_b = found.model(x)

    Args:
        models: two or more modules of one architecture that ``torch.fx`` or ``torch.export`` can follow; they are
            not changed. With ``stop_at``, tensors of the layers after it may have other shapes in each, such as heads for
            other classes.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of inputs by name; a batch of 2 is
            enough.
        rule: which units become one: :class:`fastmatch.Identity`, :class:`fastmatch.Permute`,
            :class:`fastmatch.Zip` or :class:`fastmatch.CCA`. The last three hold the data they match on.
        start_at: a group's name, or its position in ``PermutationSpec.trace(model, x).flat().groups``. All that
            runs before the layer that first produces the group stays apart.
        stop_at: the last group to be merged, by name or position. All that runs after the last layer that produces it
            stays apart, and the merge returns a tuple with the output of every model. None merges to the end.
        apart: names of further groups whose layers stay apart, wherever they are.
        weights: one per model, positive, of sum one; None takes equal ones.
        verify: check in float64 that the rewired graph with one model's weights everywhere computes that model.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        A :class:`PartialMerge`. Its ``model`` runs, saves and exports like any module. Batch norm's running
        statistics are only averaged: ``fm.renormalize(found.model, None, loader, "reset")`` measures them.

    Raises:
        TypeError: a model is not a torch module, or ``rule`` is not a rule.
        ValueError: architectures differ, an argument is out of range, a group is unknown, the data yields nothing, or
            neither ``torch.fx`` nor ``torch.export`` can follow the model.

    Warns:
        UserWarning: the rule is :class:`fastmatch.CCA` and merged units go through layer, group or RMS norms.

    Memory: for each merged group one (N n, N n) float64 matrix, or N - 1 of (n, n) to permute; :class:`fastmatch.CCA`
    also keeps n x n maps at the boundary.
    """
    check_models("models", models, least=2)
    if not isinstance(rule, (Identity, MatchedUnits)):
        raise TypeError(
            "rule: expected fm.Identity(), fm.Permute(data), fm.Zip(data) or fm.CCA(data); "
            f"got {rule if isinstance(rule, type) else type(rule)!r}"
        )
    alphas = check_weights(weights, len(models))
    if min(alphas) <= 0 or abs(sum(alphas) - 1) > 1e-6:
        raise ValueError(f"weights: expected positive numbers of sum one, got {alphas}")
    for k, model in enumerate(models):
        check_module(model, f"models[{k}]")
    models = [uncompiled(model) for model in models]
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    for k, state in enumerate(states):
        if stop_at is None:
            check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
        check_finite(state, f"models[{k}]")
    structure = trace_graph(copy_module(models[0]).eval(), example_inputs)
    plan = Rewiring(structure, start_at, apart, stop_at)
    for k, state in enumerate(states):
        # Heads have the same names, but may have any shape.
        alike = {
            name: states[0][name] if name in plan.after else t
            for name, t in state.items()
            if name in states[0]
        }
        check_same_architecture(states[0], {**state, **alike}, "models[0]", f"models[{k}]")
    if verify:
        _verify(plan, example_inputs, alphas)
    device = device_of(structure.module)
    others = (copy_module(m).eval().to(device) for m in models[1:])
    copies = [structure.module, *map(structure.on, others)]
    if isinstance(rule, Identity):
        maps = _identity(plan, alphas)
    elif not plan.joined:
        maps = {}
    else:
        unlike = [name for name in plan.joined if is_apart(structure.spec, name)]
        if unlike:
            warn_user(
                f"merge_partial: {len(unlike)} groups are merged unit by unit as they are, because no operation shows them on the same "
                f"samples in all networks: {first_of(unlike)}"
            )
        moments = _read_moments(copies, plan, rule, [n for n in plan.joined if n not in unlike], progress)
        as_they_are = _identity(plan, alphas)
        maps = {
            name: as_they_are[name] if name in unlike else rule.maps(moments[name], alphas)
            for name in plan.joined
        }
    if any(found.spread is None for found in maps.values()):
        _warn_of_norms(models[0], plan, maps)
    maps = {name: found.to(device, _work_dtype(states[0])) for name, found in maps.items()}
    model = rewire(plan, copies, maps, alphas)
    kept = tuple(name for name, _ in model.named_parameters() if name.startswith("apart."))
    remember_weights(model, alphas)
    return PartialMerge(
        model, rule.name, tuple(alphas), structure.spec, kept, maps, structure.inputs, plan.stops
    )


def _warn_of_norms(model: nn.Module, plan: Rewiring, maps: dict[str, UnitMaps]) -> None:
    """Warn of merged norms of mixed units, except batch norms: each computes a scale from the units that it reads."""
    axes_of = plan.structure.spec.axes_of
    found = [
        name
        for name, module in model.named_modules()
        if is_norm(module)
        and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        and f"{name}.weight" in plan.merged
        and any(group in maps for _, group in axes_of(f"{name}.weight"))
    ]
    if found:
        warn_user(
            f"merge_partial: the rule mixes units, and a mixture of normalized units has no scale of its own; expected no norms "
            f"except batch norms among the merged layers, got {found}. fm.Permute(data) may merge these networks better"
        )


def _identity(plan: Rewiring, weights: Sequence[float]) -> dict[str, UnitMaps]:
    groups, device = plan.structure.spec.groups, device_of(plan.structure.module)
    return {name: identity_maps(groups[name].size, weights).to(device, torch.float64) for name in plan.joined}


def _work_dtype(state: State) -> torch.dtype:
    """Return the dtype of the parameters, or float32 if that is narrower."""
    first = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    return working_dtype(first)


def _verify(plan: Rewiring, example_inputs: Any, weights: Sequence[float]) -> None:
    """Raise ValueError unless the rewired graph, with one model's weights everywhere, computes that model."""
    given, module = arguments_of(example_inputs, None), plan.structure.module

    def difference(model: nn.Module, args: Any, kwargs: Any, *, wide: bool) -> float:
        expected = outputs_of(model, args, kwargs, wide=wide) * (len(weights) if plan.stops else 1)
        same = rewire(plan, [model] * len(weights), _identity(plan, weights), weights)
        return largest_difference(expected, outputs_of(same, args, kwargs, wide=wide))

    try:
        error, tolerance = difference(double_copy(module), *map(in_double, given), wide=True), TOLERANCE
    except RuntimeError:  # it makes float32 tensors of its own
        error, tolerance = difference(copy_module(module).eval(), *given, wide=False), TOLERANCE_AS_GIVEN
    if not error <= tolerance:
        raise ValueError(
            f"models: the rewired forward pass of {len(weights)} equal models differs from the model's own by "
            f"{error:.2g} relative; it depends on something that stays apart (an in-place operation, a value that is "
            "not a tensor). Choose another start_at, or pass verify=False to skip this check"
        )


def _read_moments(
    copies: Sequence[nn.Module],
    plan: Rewiring,
    rule: MatchedUnits,
    names: Sequence[str],
    progress: bool | None,
) -> dict[str, list[CrossMoments]]:
    """Return, per named group, the moments that the rule needs (see :meth:`MatchedUnits.maps`), in one read of its data."""
    spec = plan.structure.spec
    chosen = {choose_sites(spec, name, rule.site, "last")[0]: name for name in names}
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    count = len(copies) - 1 if rule.pairwise else 1
    moments = {name: [CrossMoments() for _ in range(count)] for name in names}

    def keep(site: ActivationSite, tensor: torch.Tensor) -> None:
        rows[chosen[site]].append(unit_columns(tensor, site.axis, spec.groups[site.group].size))

    with evaluating(*copies):
        for batch in read_in_step(batches_of(rule.data, "partial merge", progress=progress), *copies):
            for copy in copies:
                with SiteReader(chosen, keep, copy, site=rule.site):
                    rule.forward(copy, batch)
            for name, parts in rows.items():
                if rule.pairwise:
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
