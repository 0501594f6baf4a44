"""The whole job in one call: trace, match, and hold the permutations ready to be applied."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, default_forward
from fastmatch._internal.states import State, check_finite, check_same_architecture, state_of
from fastmatch.matching.activations import match_activations
from fastmatch.matching.fisher import match_fisher
from fastmatch.matching.many import anchored, match_mean, match_universe
from fastmatch.matching.mixture import match_mix
from fastmatch.matching.straight_through import match_straight_through
from fastmatch.matching.weights import match_weights
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import verify as verify_spec
from fastmatch.spec import PermutationSpec
from fastmatch.spec.checks import check_spec
from fastmatch.statistics.fisher import diagonal_fisher

__all__ = ["MANY", "METHODS", "align", "align_many"]

METHODS = ("weights", "activations", "fisher", "straight-through")
"""How :func:`align` looks for the permutations."""

MANY = ("reference", "chain", "mean", "universe")
"""How several models are brought into one order, see :func:`align_many`."""


def align(
    model_a: nn.Module | State,
    model_b: nn.Module | State,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    method: str | None = None,
    spec: PermutationSpec | None = None,
    groups: list[str] | None = None,
    residual: bool = True,
    start: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    similarity: str = "correlation",
    read: str = "after",
    several: str = "last",
    mix: float | None = None,
    forward: Forward = default_forward,
    verify: bool = True,
    progress: bool | None = None,
) -> Alignment:
    """Finds which hidden unit of ``model_b`` is which of ``model_a``, by weights or, given data, by activations.

    Example:
        >>> alignment = fm.align(model_a, model_b, example_inputs=x)
        >>> model_b_aligned = alignment.apply(model_b)

    Args:
        model_a, model_b: modules of the same architecture, or state dicts (then ``spec`` is needed). A is
            the reference. Both are left as they are.
        example_inputs: what ``model_a`` is traced on: a tensor, or a tuple of positional inputs. Not needed
            with ``spec``, except to verify it.
        data: a loader of inputs or (inputs, targets); given one, activations are matched, in one read.
        method: one of :data:`METHODS`. ``"weights"`` where left out, ``"activations"`` with data. ``"fisher"``
            weighs parameters by both networks' Fisher information, from one read of (inputs, targets) for each
            network; ``"straight-through"`` trains on (inputs, targets) towards the least loss of the midpoint.
            Their options are in :mod:`fastmatch.matching.fisher` and :mod:`fastmatch.matching.straight_through`.
        spec: which axes move together, instead of tracing.
        groups: names of the groups to match; all where left out.
        residual: False leaves residual streams where they are: they move nearly every weight at once.
        start, seed, max_sweeps, tolerance, include: of weight matching, see
            :func:`fastmatch.matching.weights.match_weights`.
        similarity, read, several, forward: of activation matching, see
            :func:`fastmatch.matching.activations.match_activations`.
        mix: with ``data``, the share of the activations in ``mix * activations + (1 - mix) * weights``, both
            scaled to reach at most one, see :func:`fastmatch.matching.mixture.match_mix`; activations alone
            where left out.
        verify: prove on ``example_inputs``, in float64, that the spec leaves ``model_b``'s function alone
            (two forward passes of a copy). State dicts cannot be run and are not verified.
        progress: show bars; None shows them on a terminal, for work of over a second.

    Returns:
        An :class:`Alignment`.

    Raises:
        ValueError: architectures differ (the first mismatch is named), weights hold NaN or infinity (the
            tensor is named), the spec changes the function (the group is named), the data yields nothing,
            or an argument is out of range.
        TypeError: something that is neither a module nor a state dict.
    """
    a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
    check_same_architecture(a, b)
    check_finite(a, "model_a")
    check_finite(b, "model_b")
    if spec is None:
        if not isinstance(model_a, nn.Module):
            raise ValueError(
                "spec: state dicts cannot be traced; give a spec (PermutationSpec.trace(model, x))"
            )
        if example_inputs is None:
            raise ValueError(
                "example_inputs: needed to trace the structure of model_a; a batch of 2 is enough"
            )
        spec = PermutationSpec.trace(model_a, example_inputs)
    if groups is not None:
        spec = spec.select(groups)
    if not residual:
        spec = spec.select([name for name in spec.groups if name not in spec.residual()])
    check_spec(spec, a, "model_a")
    if not spec.groups:
        warnings.warn(
            "align: no group of units is free to move, so nothing will; "
            "`fastmatch inspect` or spec.table() says what pins them",
            stacklevel=2,
        )
    if verify and example_inputs is not None and isinstance(model_b, nn.Module):
        verify_spec(model_b, spec, example_inputs)
    by_weights: dict[str, Any] = {
        "start": start, "seed": seed, "max_sweeps": max_sweeps, "tolerance": tolerance, "include": include,
        "progress": progress,
    }  # fmt: skip
    if method is None:
        method = "weights" if data is None else "activations"
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if mix is not None and (data is None or method != "activations"):
        raise ValueError("mix: needs data, from which the activations' share comes, and no other method")
    if method == "weights":
        matching = match_weights(a, b, spec, **by_weights)
        return Alignment({**spec.identity(), **matching.permutations}, spec, matching)
    if data is None:
        raise ValueError(f"data: method {method!r} needs a loader")
    if not isinstance(model_a, nn.Module) or not isinstance(model_b, nn.Module):
        raise TypeError("data: the models are run on it; give modules, not state dicts")
    by_activations: dict[str, Any] = {
        "similarity": similarity, "read": read, "several": several, "forward": forward, "progress": progress,
    }  # fmt: skip
    if method in ("fisher", "straight-through"):
        for name, given, default in (
            ("similarity", similarity, "correlation"), ("read", read, "after"), ("several", several, "last"),
            ("forward", forward, default_forward),
        ):  # fmt: skip
            if given != default:
                raise ValueError(f"{name}: is of activation matching; method {method!r} takes none")
    if method == "fisher":
        fishers = [diagonal_fisher(model, data, progress=progress) for model in (model_a, model_b)]
        matching = match_fisher(a, b, spec, *fishers, **by_weights)
    elif method == "straight-through":
        matching = match_straight_through(model_a, model_b, spec, data, **by_weights)
    elif mix is not None:
        matching = match_mix(
            model_a, model_b, spec, data, alpha=mix, weights=by_weights, activations=by_activations
        )
    elif start is not None:
        raise ValueError("start: activation matching solves each group once and takes no start")
    else:
        matching = match_activations(model_a, model_b, spec, data, **by_activations)
    return Alignment({**spec.identity(), **matching.permutations}, spec, matching)


def align_many(
    models: Sequence[nn.Module] | Sequence[State],
    example_inputs: Any = None,
    *,
    how: str = "reference",
    reference: int = 0,
    data: Iterable[Any] | None = None,
    spec: PermutationSpec | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
    max_rounds: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    verify: bool = True,
    progress: bool | None = None,
) -> list[Alignment]:
    """One alignment a model, all into the order of ``models[reference]``, whose own is the identity.

    Example:
        >>> found = fm.align_many([a, b, c], x, how="universe")
        >>> merged = fm.merge([f.apply(m) for f, m in zip(found, [a, b, c])])

    Maps between any two models are compositions of these, so every cycle of maps is the identity.

    Args:
        models: two or more, of one architecture; modules, or state dicts (then ``spec`` is needed).
        example_inputs, spec, seed, max_sweeps, tolerance, include, verify, progress: as in :func:`align`.
        how: ``"reference"`` matches each to the reference; ``"chain"`` each to its aligned predecessor, in
            the given order from the reference on and around; ``"mean"`` each to the mean of the rest until
            a whole round moves nothing; ``"universe"`` all at once by Frank-Wolfe (C2M3).
        reference: index of the model that stays as it is.
        data: of ``"reference"`` and ``"chain"``: activations are matched; read once per model but one.
        max_rounds: of ``"mean"``: cap on rounds; ``matching.converged`` says whether it ended before.

    Raises:
        ValueError, TypeError: as :func:`align`; fewer than two models, an unknown ``how``, an index out of
            range, or data with ``"mean"`` or ``"universe"``.
    """
    if how not in MANY:
        raise ValueError(f"how: expected one of {MANY}, got {how!r}")
    if len(models) < 2:
        raise ValueError(f"models: expected at least two, got {len(models)}")
    if not 0 <= reference < len(models):
        raise ValueError(f"reference: expected an index below {len(models)}, got {reference}")
    if data is not None and how in ("mean", "universe"):
        raise ValueError(f"data: how={how!r} matches weights; give data with 'reference' or 'chain'")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    for k, state in enumerate(states):
        check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
        check_finite(state, f"models[{k}]")
    first = models[reference]
    if spec is None:
        if not isinstance(first, nn.Module) or example_inputs is None:
            raise ValueError("spec: needed unless models are modules and example_inputs is given to trace")
        spec = PermutationSpec.trace(first, example_inputs)
    check_spec(spec, states[reference], f"models[{reference}]")
    if how in ("reference", "chain"):
        found = {reference: Alignment(spec.identity(), spec)}
        target: Any = first
        for k in [(reference + step) % len(models) for step in range(1, len(models))]:
            found[k] = align(
                target, models[k], example_inputs, data=data, spec=spec, seed=seed, max_sweeps=max_sweeps,
                tolerance=tolerance, include=include, verify=verify, progress=progress,
            )  # fmt: skip
            if how == "chain":
                target = found[k].apply(models[k])
        return [found[k] for k in range(len(models))]
    if verify and example_inputs is not None and isinstance(first, nn.Module):
        verify_spec(first, spec, example_inputs)
    options: dict[str, Any] = {
        "seed": seed, "max_sweeps": max_sweeps, "tolerance": tolerance, "include": include, "progress": progress,
    }  # fmt: skip
    if how == "mean":
        permutations, matching = match_mean(states, spec, max_rounds=max_rounds, **options)
    else:
        permutations, matching = match_universe(states, spec, **options)
    found_all = anchored(permutations, reference, spec)
    return [Alignment(p, spec, replace(matching, permutations=p)) for p in found_all]
