"""Renormalization of a merged or pruned network: REPAIR, RESCALE, RESHIFT and RESET.

A merge of aligned networks has activations of too small a variance (Jordan et al. 2022, REPAIR). Each
method brings the statistics of every linear and convolution output, before norm and activation, to goals
made of the endpoints' statistics: ``mu* = sum_k alpha_k mu_k`` and ``sigma* = sum_k alpha_k sigma_k``
(Qu and Horvath 2024, arXiv 2402.05966). With the merge's own mean mu and variance v,
``g = sigma* / sqrt(v + eps)`` and ``sigma_k = sqrt(v_k + eps)``:

=========  ======================  ===============================
method     forward form            folded into weight W and bias b
=========  ======================  ===============================
repair     (z - mu) g + mu*        W' = g W, b' = mu* + g (b - mu)
rescale    z g                     W' = g W, b' = g b
reshift    z - mu + mu*            b' = b - mu + mu*
reset      batch norm's running statistics, measured anew
=========  ======================  ===============================
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    batches_of,
    check_module,
    default_forward,
    device_of,
    evaluating,
)
from fastmatch._internal.coefficients import check_weights, remembered_weights
from fastmatch._internal.modules import copy_module
from fastmatch._internal.progress import progress_bar
from fastmatch.renorm.fold import Goal, bring_to_goal, fold
from fastmatch.renorm.layers import survey
from fastmatch.renorm.lockstep import Lockstep
from fastmatch.renorm.plan import (
    Plan,
    ResidualDetector,
    batch_norms,
    choose_without_norms,
    plan_renormalization,
)
from fastmatch.renorm.statistics import CallCounter, EndpointStatistics, endpoint_statistics
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["MODES", "renormalize", "renormalize_many"]

MODES = ("joint", "sequential")
"""Joint: batch by batch, layers upstream brought to their goals by the batch's own statistics; memory of one
batch. Sequential: every layer measured over all batches after those upstream are folded; exact at any
batch size, for the memory of all batches' activations at one layer."""

log = logging.getLogger("fastmatch")


def renormalize(
    model: nn.Module,
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    data: Iterable[Any],
    method: str = "auto",
    *,
    weights: Sequence[float] | None = None,
    mode: str = "joint",
    layers: Sequence[str] | None = None,
    samples: int | None = None,
    goal: str = "weighted",
    factor: float = 1.0,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> nn.Module:
    """A copy of a merged or pruned model whose activations have the endpoints' statistics again.

    Example:
        >>> merged = fm.merge([model_a, model_b_aligned])
        >>> merged = fm.renormalize(merged, [model_a, model_b_aligned], data=loader)
        >>> pruned = fm.renormalize(pruned, [dense], data=loader, samples=128)

    A missing bias is created where the method needs one; masks of pruned layers stay as they are. Reads
    ``data`` once for the endpoints (not at all if given :class:`EndpointStatistics`, nor for ``"reset"``)
    and once for the merge.

    Args:
        model: the merge or the pruned model; left as it is.
        endpoints: the models that were merged, aligned (the dense one for a pruned model), or their measured
            statistics. May be None for ``"reset"``, which does not look at them.
        data: a loader, iterated anew for each read.
        method: ``"repair"``, ``"rescale"``, ``"reshift"``, ``"reset"`` for nets with batch norm, or ``"auto"``
            by the model's norms (see :func:`plan_renormalization`; the choice is logged).
        weights: the weights that the merge was made with, one an endpoint. :func:`fastmatch.merging.average` remembers
            them on the module, so that they can be left out.
        mode: one of :data:`MODES`. Joint mode needs large batches, since a batch's statistics stand in for
            the whole data's; sequential mode does not.
        layers: names of linear and convolution layers; all that can be where left out, and what is left
            alone comes as a warning (not for ``"reset"``).
        samples: calibrate on the first so many samples; all of them where left out.
        goal, factor: see :meth:`EndpointStatistics.goals`.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: an unknown method or mode, no batch norm for ``"reset"``, weights that are not known, data
            that yields nothing, an endpoint of another architecture, or a named layer that is never run.
    """
    return renormalize_many(
        [model], endpoints, data, method, weights=None if weights is None else [weights], mode=mode,
        layers=layers, samples=samples, goal=goal, factor=factor, forward=forward, progress=progress,
    )[0]  # fmt: skip


def renormalize_many(
    models: Sequence[nn.Module],
    endpoints: Sequence[nn.Module] | EndpointStatistics | None,
    data: Iterable[Any],
    method: str = "auto",
    *,
    weights: Sequence[Sequence[float]] | None = None,
    mode: str = "joint",
    layers: Sequence[str] | None = None,
    samples: int | None = None,
    goal: str = "weighted",
    factor: float = 1.0,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> list[nn.Module]:
    """Several merges of the same endpoints (the points of a curve) renormalized in one read of ``data``.

    Example:
        >>> merges = [fm.merge([a, b], [1 - t, t]) for t in (0.25, 0.5, 0.75)]
        >>> merges = fm.renormalize_many(merges, [a, b], loader, "repair")

    As :func:`renormalize`, with one row of ``weights`` a merge. Memory: all merges at once; in sequential mode
    the calibration batches as well.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if not models:
        raise ValueError("models: expected at least one")
    for model in models:
        check_module(model, "model")
    if weights is not None and len(weights) != len(models):
        raise ValueError(f"weights: expected {len(models)} rows, one a merge, got {len(weights)}")
    plan = plan_renormalization(models[0], method, layers=layers)
    batches = partial(batches_of, data, samples=samples, progress=progress)
    news = [copy_module(model) for model in models]
    if plan.method == "reset":
        log.info("%s", plan)
        runs = [_Run(new, _reset_hooks(new), forward) for new in news]
        _calibrate(runs, batches(f"{plan.method} of the merge"), mode, progress)
        return news
    if endpoints is None:
        raise ValueError(
            f"endpoints: expected the merged models or their statistics for method {plan.method!r}"
        )
    count = len(endpoints.calls) if isinstance(endpoints, EndpointStatistics) else len(endpoints)
    alphas = [_weights_of(m, None if weights is None else weights[k], count) for k, m in enumerate(models)]
    if not isinstance(endpoints, EndpointStatistics):
        for k, endpoint in enumerate(endpoints):
            _check_endpoint(models[0], plan, endpoint, f"endpoints[{k}]")
        endpoints = endpoint_statistics(
            endpoints, data, layers=plan.layers if layers is not None else None, samples=samples,
            forward=forward, progress=progress,
        )  # fmt: skip
    plan = _without_unseen(plan, endpoints, explicit=layers is not None)
    _warn_of(plan)
    stream = batches(f"{plan.method} of the merge")
    if plan.method == "auto":
        stream, plan = _chosen_on_the_first_batch(plan, news[0], stream, forward)
    log.info("%s", plan)
    tables = [_GoalTable(endpoints, a, goal, factor) for a in alphas]
    hooks = [_affine_hooks(new, plan, table) for new, table in zip(news, tables, strict=True)]
    _calibrate([_Run(n, h, forward) for n, h in zip(news, hooks, strict=True)], stream, mode, progress)
    return news


def _weights_of(model: nn.Module, weights: Sequence[float] | None, count: int) -> list[float]:
    """The merge's weights, given or remembered; never guessed for more than one endpoint."""
    if weights is not None:
        return check_weights(weights, count)
    known = remembered_weights(model)
    if known is not None and len(known) == count:
        return list(known)
    if known is not None:
        raise ValueError(
            f"endpoints: the model was merged of {len(known)} with weights {list(known)}, got {count}; give "
            "all of them, or weights= if the goals shall come from others (weights=[1.0] for a pruned merge)"
        )
    if count == 1:
        return [1.0]
    raise ValueError(
        f"weights: needed for {count} endpoints: the model does not remember how it was merged "
        "(fastmatch.merging.average of modules makes one that does)"
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


def _without_unseen(plan: Plan, endpoints: EndpointStatistics, *, explicit: bool) -> Plan:
    """The plan without layers that the endpoints never ran; an error where they were asked for or none is left."""
    unseen = [name for name in plan.layers if name not in endpoints.calls[0]]
    if unseen and (explicit or len(unseen) == len(plan.layers)):
        raise ValueError(f"endpoints: have no statistics for layer {unseen[0]!r}; was it run on the data?")
    left = {**plan.left_alone, **dict.fromkeys(unseen, "is never run as a module on the data")}
    return Plan(plan.method, plan.why, tuple(n for n in plan.layers if n not in unseen), left)


def _warn_of(plan: Plan) -> None:
    if plan.left_alone:
        listed = "; ".join(f"{name}: {reason}" for name, reason in plan.left_alone.items())
        warnings.warn(f"renormalize leaves these alone: {listed}", UserWarning, stacklevel=4)


def _chosen_on_the_first_batch(
    plan: Plan, model: nn.Module, stream: Iterator[Any], forward: Forward
) -> tuple[Iterator[Any], Plan]:
    """The stream as it was, and the method for a net without norms, from how it treats the first batch."""
    first = next(stream)
    with evaluating(model), ResidualDetector() as detector:
        forward(model, first)
    method, why = choose_without_norms(detector.found)

    def again() -> Iterator[Any]:
        yield first
        yield from stream

    return again(), Plan(method, why, plan.layers, plan.left_alone)


class _Hooked:
    """A module whose tensor is measured and replaced in every call, and that is settled after the last batch."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.moments = ChannelMoments()
        self.batches = 0

    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """The tensors of one call, of one batch (joint) or all of them (sequential), as they shall go on."""
        raise NotImplementedError

    def settle(self) -> None:
        """Writes the result into the module."""
        raise NotImplementedError


class _Affine(_Hooked):
    """A linear or convolution layer, its output brought to the goal of the call."""

    def __init__(self, name: str, layer: Any, goals: _GoalTable, method: str) -> None:
        super().__init__(name, layer)
        self._layer, self._goals, self._method = layer, goals, method

    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Outputs, brought to the goal by their pooled statistics."""
        news, moments = bring_to_goal(self._layer, tensors, self._goals.of(self.name, call), self._method)
        self.moments.merge(moments)
        return news

    def settle(self) -> None:
        """Folds into weight and bias."""
        if self.moments.count:
            fold(self._layer, self.moments, self._goals.of(self.name, None), self._method)


class _Reset(_Hooked):
    """A batch norm, normalizing by the statistics of what comes in."""

    def treat(self, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Inputs, as they are: the module is set to their pooled statistics before it runs on them."""
        moments = ChannelMoments()
        for tensor in tensors:
            moments.update(tensor, dim=1 if tensor.ndim > 1 else 0)
        if moments.count:
            self.moments.merge(moments)
            self._set(moments)
        self.batches += len(tensors)
        return tensors

    def settle(self) -> None:
        """Sets the running statistics to those of all samples."""
        if self.moments.count:
            self._set(self.moments)
            counter: Any = self.module.num_batches_tracked
            if counter is not None:
                counter.fill_(self.batches)

    def _set(self, moments: ChannelMoments) -> None:
        module: Any = self.module
        module.running_mean.copy_(moments.mean)
        # The unbiased variance, as torch keeps it.
        module.running_var.copy_(moments.m2 / max(moments.count - 1, 1))


class _GoalTable:
    """Goals per layer and call, made when they are asked for."""

    def __init__(self, endpoints: EndpointStatistics, weights: list[float], goal: str, factor: float) -> None:
        self._make = partial(endpoints.goals, weights, goal=goal, factor=factor)
        self._made: dict[int | None, dict[str, Goal]] = {None: self._make()}

    def of(self, name: str, call: int | None) -> Goal:
        """The goal of one call; pooled over calls for None."""
        if call not in self._made:
            self._made[call] = self._make(call=call)
        return self._made[call][name]


def _affine_hooks(model: nn.Module, plan: Plan, goals: _GoalTable) -> list[_Hooked]:
    found = survey(model, plan.layers)[0]
    return [_Affine(name, layer, goals, plan.method) for name, layer in found.items()]


def _reset_hooks(model: nn.Module) -> list[_Hooked]:
    return [_Reset(name, norm) for name, norm in batch_norms(model).items()]


class _Run:
    """One model under calibration: its hooks, and the pass that sets them off."""

    def __init__(self, model: nn.Module, hooked: list[_Hooked], forward: Forward) -> None:
        self.model, self._forward = model, forward
        self._hooked = {h.name: h for h in hooked}

    def joint(self, batch: Any) -> None:
        """One batch, every module treated by the batch's own statistics."""
        counter = CallCounter()
        with self._treating(lambda name, tensor: self._hooked[name].treat([tensor], counter.next(name))[0]):
            self._forward(self.model, batch)

    def sequential(self, batches: list[Any], progress: bool | None) -> None:
        """All batches side by side, every module treated by the statistics of all of them."""
        counter = CallCounter()
        lockstep = Lockstep(lambda name, tensors: self._hooked[name].treat(tensors, counter.next(name)))
        passes = [partial(self._forward, self.model, batch) for batch in batches]
        with self._treating(lockstep.meet):
            meetings = lockstep.run(passes, device_of(self.model))
            for _ in progress_bar(meetings, "layer by layer", show=progress, total=len(self._hooked)):
                pass

    @contextmanager
    def _treating(self, treat: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Hands every module's tensor to ``treat`` and puts back what it returns."""
        handles = []
        try:
            for name, hooked in self._hooked.items():
                if isinstance(hooked, _Reset):
                    hook = partial(_on_input, partial(treat, name))
                    handles.append(hooked.module.register_forward_pre_hook(hook))
                else:
                    hook = partial(_on_output, partial(treat, name))
                    handles.append(hooked.module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def settle(self) -> None:
        """Writes what was measured into the model."""
        with torch.no_grad():
            for hooked in self._hooked.values():
                hooked.settle()


def _on_input(treat: Callable[[torch.Tensor], Any], _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    treat(inputs[0])


def _on_output(
    treat: Callable[[torch.Tensor], torch.Tensor], _module: nn.Module, _inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    return treat(output)


def _calibrate(runs: list[_Run], stream: Iterable[Any], mode: str, progress: bool | None) -> None:
    """One read of the stream for all runs, then the results written into their models."""
    with evaluating(*(run.model for run in runs)):
        if mode == "joint":
            for batch in stream:
                for run in runs:
                    run.joint(batch)
        else:
            batches = list(stream)
            for run in runs:
                run.sequential(batches, progress)
    for run in runs:
        run.settle()
