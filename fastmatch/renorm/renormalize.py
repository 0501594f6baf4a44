"""Renormalization of merged or pruned networks, by every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, check_module, default_forward
from fastmatch._internal.callers import warn_user
from fastmatch._internal.coefficients import (
    check_weights,
    has_stale_note,
    remember_weights,
    remembered_weights,
    warn_of_scale,
)
from fastmatch._internal.divided import check_undivided
from fastmatch._internal.modules import copy_module
from fastmatch._internal.ranks import Ranks, current, on_all_ranks
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.shared_data import read_alike, share_of_rank
from fastmatch.renorm.calibrate import Calibration, calibrate
from fastmatch.renorm.endpoints import EndpointStatistics, endpoint_statistics
from fastmatch.renorm.few import FEWEST, SampleCount, no_variance, warn_of_few
from fastmatch.renorm.hooks import Targets, affine_hooks, reset_hooks
from fastmatch.renorm.layers import survey
from fastmatch.renorm.least_squares import LayerFit, fit_jointly, fit_sequentially
from fastmatch.renorm.norms import batch_norms
from fastmatch.renorm.options import Method, Renormalization, renormalization_of
from fastmatch.renorm.outputs import PREFERENCE, disagreement
from fastmatch.renorm.plan import (
    Plan,
    applied_plan,
    candidates,
    plan_renormalization,
    remember_plan,
    tries_least_squares,
)
from fastmatch.renorm.targets import Target
from fastmatch.renorm.trial import Trial, try_least_squares

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

    The methods and their formulas are in :mod:`fastmatch.renorm`. A missing bias is created if the method
    needs one, as all but RESCALE and RESET do: a model that loads the result then needs it too (``bias=True``).
    :func:`fastmatch.applied_plan` names the new ones.
    Masks of pruned layers do not change. Modules that are left alone are listed in a warning. Channels that a gain would
    harm, such as those whose weights are all pruned, keep gain one; :func:`fastmatch.applied_plan` lists them.

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
            are given, nor for ``"reset"``) and once for the model. ``"least-squares"`` reads it once, and in joint mode with batch norm twice.
        method: ``"repair"``, ``"rescale"``, ``"reshift"``, ``"reset"`` or ``"least-squares"``, or a
            :class:`fastmatch.Renormalization` with further options. ``"auto"`` tries REPAIR, RESCALE, RESET (with batch norm) and nothing at all, and keeps the
            copy whose outputs are nearest to the weighted mean of the endpoints' outputs on 1024 samples that are spread over the data. If each
            sample's target is one class, that is the copy with the least often another class, and then the smallest angle. Otherwise (values, several
            classes in a sample, or no targets) it is the one with the smallest squared error, and nothing is done unless that is 10% smaller. Without
            outputs to compare, nothing is tried blindly: batch norms are reset, and other networks left alone with a warning. So are networks for classes with fewer than 8 samples. If the endpoints are models, it also tries
            least squares, in sequential mode on those samples (in 64 batches at most), and judges it on some that it was not fitted to.
        weights: the weights of the merge, one per endpoint. None takes those that :func:`fastmatch.merge` noted on
            the module, which hold until other tensors are loaded into it.
        forward: ``forward(model, batch)`` runs a model on a batch.
        progress: show a progress bar; None shows it on a terminal.

    In a torch.distributed process group all ranks make the call, and get the same model. In joint mode, without ``samples``, they
    share the batches, and the model does not depend on the number of ranks. Otherwise, and for ``"least-squares"``, each rank reads
    all data, so that several ranks take as long as one.

    Raises:
        TypeError: a model is not a torch module, or is divided among ranks, or ``method`` is neither a word nor a
            Renormalization.
        ValueError: an unknown method, an option that the method does not use, no batch norm for ``"reset"``, weights
            that are not known or sum to zero, no data, an endpoint of another architecture, endpoints whose average (by the weights that the merge noted) is not the merge, a named layer that is never run, one
            sample of one value for each channel (as the first batch in joint mode, as all data in sequential mode and for ``"least-squares"``) for a
            method that needs a variance, as all but ``"reshift"`` do, activations that are not finite (batch and layer are named), or ranks that were given
            different models, options or data.

    Warns:
        UserWarning: ``weights`` do not sum to one, so that the targets are scaled; layers are left alone; or ``"auto"`` leaves the merge
            alone because there are no outputs to compare, or too few samples; or a named method is calibrated on fewer than 8.

    Source:
        Jordan et al. 2022 (REPAIR); Qu and Horvath 2024 (RESCALE, RESHIFT); Nasery et al. 2024 (least squares).
    """
    check_module(model, "model")
    rows = None if weights is None else [weights]
    return renormalize_many(
        [model], endpoints, data, method, weights=rows, forward=forward, progress=progress
    )[0]


@torch.inference_mode(False)
@on_all_ranks
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

    Memory: all merges at once, ``"auto"`` a copy of each per method; in sequential mode also the calibration batches, and for the
    trial of least squares a layer's inputs and outputs on 1024 samples in every model, 2 GiB at most.
    """
    ranks = current()
    options = renormalization_of(method)
    if isinstance(data, str) and data in get_args(Method):  # a word in the place of the loader
        ends = "None" if data == "reset" else "endpoints"
        raise TypeError(
            f'data: expected a loader, got the method {data!r}; endpoints stand before the data: renormalize(model, {ends}, loader, "{data}")'
        )
    if not models:
        raise ValueError("models: expected at least one")
    for k, model in enumerate(models):
        check_module(model, f"models[{k}]")
        check_undivided(model, f"models[{k}]")
    if weights is not None and len(weights) != len(models):
        raise ValueError(f"weights: expected {len(models)} rows, one per merge, got {len(weights)}")
    plan = _without_endpoints(models[0], options) if endpoints is None else None
    plan = plan or plan_renormalization(models[0], options)
    merged_from = None if weights is not None or isinstance(endpoints, EndpointStatistics) else endpoints
    notes = [remembered_weights(m, merged_from if applied_plan(m) is None else None) for m in models]
    alphas = _weights_of_merges(models, notes, endpoints, weights, plan)
    _check_same(ranks, models, endpoints, {"method": options, "weights": alphas, "forward": forward})

    count = SampleCount()

    def read(title: str) -> Iterator[Any]:
        every = count.counted(batches_of(data, title, samples=options.samples, progress=progress))
        fitted = () if endpoints is None or isinstance(endpoints, EndpointStatistics) else endpoints
        return read_alike(every, ranks, *models, *fitted)

    if plan.method == "least-squares":
        news, plan, lacking = _fitted(models, endpoints, alphas, read, plan, options, forward, progress)
        if lacking is not None and count.samples == 1:
            raise ValueError(no_variance("the whole", lacking))
        _warn_of_modules_left_alone(plan)
        warn_of_few(count.samples, plan.method)
        return news
    statistics = None
    if plan.method != "reset":
        assert endpoints is not None
        statistics = _measured(endpoints, models[0], data, plan, options, forward, progress)
        missing = [name for name in plan.layers if all(name not in table for table in statistics.calls)]
        plan = _without_unmeasured(plan, missing, explicit=options.layers is not None)
        missing = [name for name in plan.layers if any(name not in table for table in statistics.calls)]
        reason = "is not run on the data by every endpoint, as an expert that gets no samples"
        plan = _without_unmeasured(plan, missing, explicit=options.layers is not None, reason=reason)
        _warn_of_modules_left_alone(plan)
    methods = candidates(models[0], options) if plan.method == "auto" else (plan.method,)
    tried = [
        [
            _Attempt(model, replace(plan, method=m), targets, forward, is_chosen=len(methods) == 1)
            for m in methods
        ]
        for model, targets in zip(
            models, _targets_of_merges(statistics, alphas, options, models), strict=True
        )
    ]
    calibrations = [a.calibration for attempts in tried for a in attempts if a.plan.method != "none"]
    is_shared = options.mode == "joint" and options.samples is None
    share = share_of_rank(data, *models) if is_shared else None
    if share is not None:
        share = share._replace(batches=count.counted(share.batches))
    calibrate(calibrations, share or read(f"{plan.method} of the merge"), options.mode, progress)
    if share is not None:
        count.add_ranks(ranks)
    if plan.method != "auto":
        warn_of_few(count.samples, plan.method)
    news = []
    for k, attempts in enumerate(tried):
        new, done, kept = attempts[0].model, attempts[0].plan, attempts[0].calibration.kept
        if plan.method == "auto":
            assert statistics is not None
            best = _best(attempts, statistics, alphas[k], forward)
            new, done, kept = best.model, best.plan, best.calibration.kept
            if done.scores and tries_least_squares(options) and not isinstance(endpoints, EndpointStatistics):
                ends = (endpoints or (), alphas[k])
                trial = try_least_squares(
                    models[k], ends, statistics.probes, new, plan.layers, forward, len(models)
                )
                done = _after(trial, done, plan)
                if trial.model is not None:
                    new, kept = trial.model, {}
        known = notes[k]
        remember_plan(new, models[k], done, kept)
        if known is not None:  # the new tensors are those of the same merge
            remember_weights(new, known)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", applied_plan(new))
        news.append(new)
    return news


def _check_same(
    ranks: Ranks,
    models: Sequence[nn.Module],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    options: Mapping[str, object],
) -> None:
    """Raise ValueError on all ranks if one was given something else."""
    if ranks.size == 1:
        return
    named: dict[str, nn.Module | Mapping[str, torch.Tensor]] = {
        f"models[{k}]": m for k, m in enumerate(models)
    }
    if isinstance(endpoints, EndpointStatistics):
        for k, table in enumerate(endpoints.models):
            found = {name: torch.stack((m.mean, m.m2)) for name, m in table.items()}
            named[f"endpoints[{k}]"] = found
    else:
        named |= {f"endpoints[{k}]": endpoint for k, endpoint in enumerate(endpoints or ())}
    check_same_on_ranks(ranks, "renormalize", options, named)


def _fitted(
    models: Sequence[nn.Module],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    alphas: Sequence[Sequence[float]],
    read: Callable[[str], Iterable[Any]],
    plan: Plan,
    options: Renormalization,
    forward: Forward,
    progress: bool | None,
) -> tuple[list[nn.Module], Plan, str | None]:
    """Return the merges with every layer fitted to the endpoints' outputs and batch norms measured, what was done, and a layer of one row."""
    if endpoints is None or isinstance(endpoints, EndpointStatistics):
        raise ValueError(
            'endpoints: method "least-squares" compares outputs sample by sample, so it needs the models; got '
            f"{type(endpoints).__name__}"
        )
    for k, endpoint in enumerate(endpoints):
        _check_endpoint(models[0], plan, endpoint, f"endpoints[{k}]")
    is_kept = options.mode == "sequential" or len(models) > 1
    batches = list(read("least squares")) if is_kept else []
    news: list[nn.Module] = []
    done, lacking = plan, None
    for model, alpha in zip(models, alphas, strict=True):
        new, known = copy_module(model), remembered_weights(model)
        fits = [LayerFit(name, layer) for name, layer in survey(new, plan.layers)[0].items()]
        if options.mode == "sequential":
            fit_sequentially(new, fits, (endpoints, alpha), batches, forward, options, progress)
        else:
            fit_jointly(fits, (endpoints, alpha), batches or read("least squares"), forward, options)
            norms = reset_hooks(new)  # averaged statistics are not those of the fitted layers' outputs
            if norms:
                calibration = Calibration(new, norms, forward)
                calibrate([calibration], batches or read("batch norms"), "joint", progress)
        lacking = next((fit.name for fit in fits if fit.has_one_row), lacking)
        idle = [fit.name for fit in fits if not fit.has_run]
        done = _without_unmeasured(plan, idle, explicit=options.layers is not None)
        remember_plan(new, model, done, {})
        if known is not None:
            remember_weights(new, known)
        log.info("%s", applied_plan(new))
        news.append(new)
    return news, done, lacking


class _Attempt:
    """A copy of a merge that one method calibrates.

    Args:
        is_chosen: whether this is the only method, not one of those that the automatic choice judges.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, targets: Targets | None, forward: Forward, *, is_chosen: bool
    ) -> None:
        self.model = copy_module(model)
        self.plan = plan
        if plan.method == "reset":
            self.plan = replace(plan, layers=tuple(batch_norms(model)), left_alone={})
            hooks = reset_hooks(self.model)
        elif plan.method == "none":
            hooks = []
        else:
            assert targets is not None
            hooks = affine_hooks(self.model, plan, targets, is_chosen=is_chosen)
        self.calibration = Calibration(self.model, hooks, forward)

    def because(self, why: str, scores: dict[str, Any] | None = None) -> _Attempt:
        """Note why this method is chosen; return the attempt."""
        self.plan = replace(self.plan, why=why, scores=scores or {})
        return self


def _best(
    attempts: Sequence[_Attempt], statistics: EndpointStatistics, weights: Sequence[float], forward: Forward
) -> _Attempt:
    """Return the attempt whose outputs are nearest to the endpoints'; without outputs to compare RESET, or the one that does nothing."""
    scores = {}
    for attempt in attempts:
        found = disagreement(attempt.model, statistics.probes, weights, forward)
        if found is not None:
            scores[attempt.plan.method] = found
    if len(scores) < len(attempts):
        return _unjudged(attempts, "cannot be compared" if statistics.probes else "are not known")
    has_classes = all(found.has_classes for found in scores.values())
    judged = sum(len(probe.outputs[0]) for probe in statistics.probes if probe.outputs[0] is not None)
    if has_classes and judged < FEWEST:
        told = f"{judged} samples are too few to calibrate and judge by: {FEWEST} are needed"
        warn_user(
            f'renormalize leaves the merge as it is: method "auto": {told}; name a method to calibrate with them'
        )
        return next(attempt for attempt in attempts if attempt.plan.method == "none").because(told)
    preferred = "repair" if has_classes else "none"

    def distance(attempt: _Attempt) -> tuple[float, float, bool]:
        method = attempt.plan.method
        is_other = method != preferred
        return *scores[method].distance(1.0 if is_other else PREFERENCE), is_other

    best = min(attempts, key=distance)
    why = f"nearest to the endpoints' outputs ({', '.join(f'{m} {s}' for m, s in scores.items())})"
    return best.because(why, scores)


def _unjudged(attempts: Sequence[_Attempt], reason: str) -> _Attempt:
    """Return the attempt with RESET, which puts right what a merge of batch norms has wrong for sure, or the one that does nothing."""
    by_method: dict[str, _Attempt] = {attempt.plan.method: attempt for attempt in attempts}
    told = f"the endpoints' outputs {reason}"
    if "reset" in by_method:
        return by_method["reset"].because(f"the network has batch norm, and {told}")
    warn_user(
        f'renormalize leaves the merge as it is, because {told}, so that "auto" cannot judge its candidates; name a method, such as '
        '"repair", or give the models as endpoints'
    )
    return by_method["none"].because(told)


def _after(trial: Trial, done: Plan, plan: Plan) -> Plan:
    """Return the plan of the best other candidate, with what the trial of least squares found, or that of least squares."""
    done = replace(done, why=f"{done.why}; {trial.told}")
    if trial.found is not None:
        done = replace(done, scores={**done.scores, "least-squares": trial.found})
    if trial.model is not None:
        done = replace(done, method="least-squares", layers=plan.layers, left_alone=plan.left_alone)
    return done


def _without_endpoints(model: nn.Module, options: Renormalization) -> Plan | None:
    """Return the plan of the automatic choice without endpoints, which only batch norm has."""
    norms = batch_norms(model)
    if options.method != "auto" or not norms:
        return None
    replace(options, method="reset")  # refuses options that reset does not use
    return Plan("reset", "the network has batch norm, and no endpoints were given", tuple(norms), {})


def _weights_of_merges(
    models: Sequence[nn.Module],
    notes: Sequence[tuple[float, ...] | None],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    weights: Sequence[Sequence[float]] | None,
    plan: Plan,
) -> list[list[float]]:
    """Return the weights of every merge, given or noted on it; for ``"reset"``, which does not use them, only check those that are given."""
    if endpoints is None:
        if plan.method != "reset":
            raise ValueError(
                f"endpoints: expected the merged models or their statistics for method {plan.method!r}"
            )
        if weights is not None:
            raise ValueError('weights: method "reset" without endpoints has no use for weights')
        return []
    if isinstance(endpoints, nn.Module):
        raise TypeError(
            f"endpoints: expected a list of models, got one {type(endpoints).__name__}; give [model]"
        )
    count = len(endpoints.calls) if isinstance(endpoints, EndpointStatistics) else len(endpoints)
    if count == 0:
        raise ValueError("endpoints: expected at least one model")
    if weights is not None:
        given = [check_weights(row, count) for row in weights]
        for row in given:
            if abs(sum(row)) < 1e-6:
                raise ValueError(f"weights: expected those of the merge, which do not sum to zero; got {row}")
            warn_of_scale(row, "renormalize", "what activations are brought to")
        return given
    if plan.method == "reset":
        return []
    return [_noted_weights(model, known, count) for model, known in zip(models, notes, strict=True)]


def _noted_weights(model: nn.Module, known: tuple[float, ...] | None, count: int) -> list[float]:
    """Return the weights noted on a merge. They are never guessed for more than one endpoint."""
    if known is not None and len(known) == count:
        return list(known)
    if known is not None:
        raise ValueError(
            f"endpoints: the model was merged of {len(known)} with weights {list(known)}, got {count}; give all of "
            "them, or pass weights= to take the target from other models (weights=[1.0] for a pruned merge)"
        )
    if count == 1:
        return [1.0]
    why = (
        "the model holds other tensors than when it was merged"
        if has_stale_note(model)
        else "the model has no note of how it was merged (fastmatch.merge of modules leaves one)"
    )
    raise ValueError(f"weights: needed for {count} endpoints, because {why}")


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


def _without_unmeasured(
    plan: Plan,
    missing: Sequence[str],
    *,
    explicit: bool,
    reason: str = "is never run as a module on the data",
) -> Plan:
    """Return the plan without layers that were never run.

    Raises:
        ValueError: such a layer was asked for, or no layer remains.
    """
    if missing and (explicit or len(missing) == len(plan.layers)):
        raise ValueError(f"endpoints: have no statistics for layer {missing[0]!r}; was it run on the data?")
    left = {**plan.left_alone, **dict.fromkeys(missing, reason)}
    return replace(plan, layers=tuple(n for n in plan.layers if n not in missing), left_alone=left)


def _warn_of_modules_left_alone(plan: Plan) -> None:
    if plan.left_alone:
        listed = "; ".join(f"{name}: {reason}" for name, reason in plan.left_alone.items())
        warn_user(f"renormalize leaves these alone: {listed}")


def _targets_of_merges(
    statistics: EndpointStatistics | None,
    alphas: Sequence[Sequence[float]],
    options: Renormalization,
    models: Sequence[nn.Module],
) -> list[Targets | None]:
    if statistics is None:
        return [None] * len(models)
    return [_targets_of(statistics, row, options) for row in alphas]


def _targets_of(
    statistics: EndpointStatistics, weights: Sequence[float], options: Renormalization
) -> Targets:
    """Return a function from the position of a call to the targets of all layers; each is computed once."""

    @cache
    def targets(call: int | None) -> dict[str, Target]:
        return statistics.targets(weights, target=options.target, std_factor=options.std_factor, call=call)

    return targets
