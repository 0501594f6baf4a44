"""REPAIR, RESCALE, RESHIFT and RESET of merged or pruned networks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, check_module, default_forward, evaluating
from fastmatch._internal.coefficients import check_weights, remembered_weights
from fastmatch._internal.modules import copy_module
from fastmatch.renorm.calibrate import Calibration, calibrate
from fastmatch.renorm.endpoints import EndpointStatistics, endpoint_statistics
from fastmatch.renorm.hooks import Targets, affine_hooks, reset_hooks
from fastmatch.renorm.options import Method, Renormalization, renormalization_of
from fastmatch.renorm.plan import Plan, ResidualDetector, choose_without_norms, plan_renormalization
from fastmatch.renorm.targets import Target

__all__ = ["renormalize", "renormalize_many"]

log = logging.getLogger("fastmatch")


def renormalize(
    model: nn.Module,
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    data: Iterable[Any],
    method: Method | Renormalization = "auto",
    *,
    weights: Sequence[float] | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> nn.Module:
    """Return a copy of a merged or pruned model whose activations have the endpoints' statistics again.

    The methods and their formulas are in :mod:`fastmatch.renorm`. A missing bias is created if the method needs one.
    Masks of pruned layers do not change. Modules that are left alone are listed in a warning.

    Example:
        >>> merged = fm.merge([model_a, model_b])
        >>> repaired = fm.renormalize(merged, [model_a, model_b], loader, "repair")
        >>> options = fm.Renormalization("repair", mode="sequential", samples=128)
        >>> repaired = fm.renormalize(merged, [model_a, model_b], loader, options)

    Args:
        model: the merged or pruned model; it is not changed.
        endpoints: the models that were merged, aligned (for a pruned model: the dense one), or their measured
            statistics. ``"reset"`` does not look at them, so they may be None.
        data: a loader of inputs or (inputs, targets). It is read once for the endpoints (not if their statistics
            are given, nor for ``"reset"``) and once for the model.
        method: ``"auto"``, ``"repair"``, ``"rescale"``, ``"reshift"`` or ``"reset"``, or a
            :class:`fastmatch.Renormalization` with further options.
        weights: the weights of the merge, one per endpoint. None takes those that :func:`fastmatch.merge` noted on
            the module.
        forward: ``forward(model, batch)`` runs a model on a batch.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        TypeError: a model is not a torch module, or ``method`` is neither a word nor a Renormalization.
        ValueError: an unknown method, an option that the method does not use, no batch norm for ``"reset"``, weights
            that are not known, no data, an endpoint of another architecture, a named layer that is never run, a batch
            of one value for each channel, or activations that are not finite: batch and layer are named.

    Source:
        Jordan et al. 2022 (REPAIR); Qu and Horvath 2024 (RESCALE, RESHIFT).
    """
    check_module(model, "model")
    rows = None if weights is None else [weights]
    return renormalize_many(
        [model], endpoints, data, method, weights=rows, forward=forward, progress=progress
    )[0]


@torch.inference_mode(False)
def renormalize_many(
    models: Sequence[nn.Module],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    data: Iterable[Any],
    method: Method | Renormalization = "auto",
    *,
    weights: Sequence[Sequence[float]] | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> list[nn.Module]:
    """Renormalize several merges of the same endpoints, such as the points of a curve, in one read of the data.

    Example:
        >>> merges = [fm.merge([model_a, model_b], [1 - t, t]) for t in (0.25, 0.5, 0.75)]
        >>> merges = fm.renormalize_many(merges, [model_a, model_b], loader, "repair")

    Args:
        models: merges of one architecture; they are not changed.
        endpoints, data, method, forward, progress: see :func:`renormalize`.
        weights: one row per merge, as for :func:`renormalize`.

    Returns:
        The renormalized copies, in the order of ``models``.

    Raises:
        TypeError, ValueError: see :func:`renormalize`.

    Memory: all merges at once; in sequential mode also the calibration batches.
    """
    options = renormalization_of(method)
    if not models:
        raise ValueError("models: expected at least one")
    for k, model in enumerate(models):
        check_module(model, f"models[{k}]")
    if weights is not None and len(weights) != len(models):
        raise ValueError(f"weights: expected {len(models)} rows, one per merge, got {len(weights)}")
    plan = plan_renormalization(models[0], options)
    alphas = _weights_of_merges(models, endpoints, weights, plan)
    news = [copy_module(model) for model in models]
    read = partial(batches_of, data, samples=options.samples, progress=progress)
    if plan.method == "reset":
        batches = read("reset of the merge")
        hooks = [reset_hooks(new) for new in news]
    else:
        assert endpoints is not None
        statistics = _measured(endpoints, models[0], data, plan, options, forward, progress)
        plan = _without_unmeasured(plan, statistics, explicit=options.layers is not None)
        _warn_of_modules_left_alone(plan)
        batches = read(f"{plan.method} of the merge")
        if plan.method == "auto":
            batches, plan = _chosen_on_first_batch(plan, news[0], batches, forward)
        targets = [_targets_of(statistics, row, options) for row in alphas]
        hooks = [affine_hooks(new, plan, own) for new, own in zip(news, targets, strict=True)]
    log.info("%s", plan)
    calibrations = [Calibration(new, own, forward) for new, own in zip(news, hooks, strict=True)]
    calibrate(calibrations, batches, options.mode, progress)
    return news


def _weights_of_merges(
    models: Sequence[nn.Module],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    weights: Sequence[Sequence[float]] | None,
    plan: Plan,
) -> list[list[float]]:
    """Return the weights of every merge; for ``"reset"``, which does not use them, only check those that are given."""
    if endpoints is None:
        if plan.method != "reset":
            raise ValueError(
                f"endpoints: expected the merged models or their statistics for method {plan.method!r}"
            )
        if weights is not None:
            raise ValueError('weights: method "reset" without endpoints has no use for weights')
        return []
    count = len(endpoints.calls) if isinstance(endpoints, EndpointStatistics) else len(endpoints)
    if count == 0:
        raise ValueError("endpoints: expected at least one model")
    if weights is not None:
        return [check_weights(row, count) for row in weights]
    return [] if plan.method == "reset" else [_noted_weights(model, count) for model in models]


def _noted_weights(model: nn.Module, count: int) -> list[float]:
    """Return the weights noted on a merge. They are never guessed for more than one endpoint."""
    known = remembered_weights(model)
    if known is not None and len(known) == count:
        return list(known)
    if known is not None:
        raise ValueError(
            f"endpoints: the model was merged of {len(known)} with weights {list(known)}, got {count}; give all of "
            "them, or pass weights= to take the target from other models (weights=[1.0] for a pruned merge)"
        )
    if count == 1:
        return [1.0]
    raise ValueError(
        f"weights: needed for {count} endpoints, because the model has no note of how it was merged "
        "(fastmatch.merge of modules leaves one)"
    )


def _measured(
    endpoints: Sequence[nn.Module] | EndpointStatistics,
    model: nn.Module,
    data: Iterable[Any],
    plan: Plan,
    options: Renormalization,
    forward: Forward,
    progress: bool | None,
) -> EndpointStatistics:
    """Return the statistics of the endpoints, measured on ``data`` unless they are given."""
    if isinstance(endpoints, EndpointStatistics):
        return endpoints
    for k, endpoint in enumerate(endpoints):
        _check_endpoint(model, plan, endpoint, f"endpoints[{k}]")
    layers = plan.layers if options.layers is not None else None
    return endpoint_statistics(
        endpoints, data, layers=layers, samples=options.samples, forward=forward, progress=progress
    )


def _check_endpoint(model: nn.Module, plan: Plan, endpoint: object, argument: str) -> None:
    check_module(endpoint, argument)
    assert isinstance(endpoint, nn.Module)
    theirs = dict(endpoint.named_modules())
    for name in plan.layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        found = getattr(theirs.get(name), "weight", None)
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"{argument}: has no tensor '{name}.weight', which model has; expected its architecture"
            )
        if found.shape != weight.shape:
            raise ValueError(
                f"{argument}: tensor '{name}.weight' has shape {tuple(found.shape)}, model has {tuple(weight.shape)}"
            )


def _without_unmeasured(plan: Plan, statistics: EndpointStatistics, *, explicit: bool) -> Plan:
    """Return the plan without layers that the endpoints never ran.

    Raises:
        ValueError: such a layer was asked for, or no layer remains.
    """
    missing = [name for name in plan.layers if name not in statistics.calls[0]]
    if missing and (explicit or len(missing) == len(plan.layers)):
        raise ValueError(f"endpoints: have no statistics for layer {missing[0]!r}; was it run on the data?")
    left = {**plan.left_alone, **dict.fromkeys(missing, "is never run as a module on the data")}
    return Plan(plan.method, plan.why, tuple(n for n in plan.layers if n not in missing), left)


def _warn_of_modules_left_alone(plan: Plan) -> None:
    if plan.left_alone:
        listed = "; ".join(f"{name}: {reason}" for name, reason in plan.left_alone.items())
        warnings.warn(f"renormalize leaves these alone: {listed}", UserWarning, stacklevel=4)


def _chosen_on_first_batch(
    plan: Plan, model: nn.Module, batches: Iterator[Any], forward: Forward
) -> tuple[Iterator[Any], Plan]:
    """Return the same batches, and the plan with the method that fits a network without norms."""
    first = next(batches)
    with evaluating(model), ResidualDetector() as detector:
        forward(model, first)
    method, why = choose_without_norms(detector.found)
    return chain([first], batches), Plan(method, why, plan.layers, plan.left_alone)


def _targets_of(
    statistics: EndpointStatistics, weights: Sequence[float], options: Renormalization
) -> Targets:
    """Return a function from the position of a call to the targets of all layers; each is computed once."""

    @cache
    def targets(call: int | None) -> dict[str, Target]:
        return statistics.targets(weights, target=options.target, std_factor=options.std_factor, call=call)

    return targets
