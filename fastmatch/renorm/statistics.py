"""The endpoints' statistics: measured once, permuted with their models, and mixed into goals for any merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, check_module, default_forward, evaluating
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import dimension_indices
from fastmatch.renorm.fold import EPS, Goal
from fastmatch.renorm.layers import channel_dim, survey
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["GOALS", "EndpointStatistics", "endpoint_statistics"]

GOALS = ("weighted", "average")
"""Goals are mixed by the merge's weights, or are the plain average of the endpoints at every weight."""

Calls = tuple[ChannelMoments, ...]


@dataclass(frozen=True)
class EndpointStatistics:
    """Per endpoint and layer, the statistics of the layer's output; measured once, used for every merge.

    Attributes:
        calls: per endpoint, layer name -> the moments of the layer's first, second, ... call in a forward
            pass; a module that a network uses twice has two.
    """

    calls: tuple[dict[str, Calls], ...]

    @property
    def models(self) -> tuple[dict[str, ChannelMoments], ...]:
        """Per endpoint, layer name -> moments pooled over calls."""
        return tuple({name: pooled(calls) for name, calls in table.items()} for table in self.calls)

    def __add__(self, other: EndpointStatistics) -> EndpointStatistics:
        """The endpoints of both, this one's first: each model can be measured by itself."""
        if set(self.calls[0]) != set(other.calls[0]):
            raise ValueError("other: expected statistics of the same layers")
        return EndpointStatistics((*self.calls, *other.calls))

    def permuted(self, *alignments: Alignment | None) -> EndpointStatistics:
        """The statistics of the aligned endpoints, without running them: channels move, numbers stay.

        Example:
            >>> both = fm.endpoint_statistics([model_a, model_b], loader)
            >>> both = both.permuted(None, alignment)  # those of model_a and alignment.apply(model_b)

        Args:
            alignments: one an endpoint; None for those that stay as they are.
        """
        if len(alignments) != len(self.calls):
            raise ValueError(
                f"alignments: expected {len(self.calls)}, one an endpoint, got {len(alignments)}"
            )
        return EndpointStatistics(
            tuple(
                table if alignment is None else _permuted(table, alignment)
                for table, alignment in zip(self.calls, alignments, strict=True)
            )
        )

    def goals(
        self,
        weights: Sequence[float],
        *,
        goal: str = "weighted",
        factor: float = 1.0,
        call: int | None = None,
    ) -> dict[str, Goal]:
        """Layer name -> (mu*, sigma*), float64.

        Args:
            weights: one an endpoint.
            goal: one of :data:`GOALS`.
            factor: multiplies sigma*; above 1 the merge's activations spread more than the endpoints'.
            call: of one call of the layer, 0 the first; pooled over calls where left out or never made.
        """
        if goal not in GOALS:
            raise ValueError(f"goal: expected one of {GOALS}, got {goal!r}")
        if not 0 < factor < float("inf"):
            raise ValueError(f"factor: expected a positive number, got {factor}")
        if goal == "average":
            weights = [sum(weights) / len(weights)] * len(weights)
        goals = {}
        for name in self.calls[0]:
            moments = [
                table[name][call] if call is not None and call < len(table[name]) else pooled(table[name])
                for table in self.calls
            ]
            mean = torch.stack([w * m.mean for w, m in zip(weights, moments, strict=True)]).sum(0)
            std = torch.stack([w * (m.variance + EPS).sqrt() for w, m in zip(weights, moments, strict=True)])
            goals[name] = (mean, factor * std.sum(0))
        return goals


def pooled(calls: Calls) -> ChannelMoments:
    """The moments over all calls of a layer."""
    total = ChannelMoments()
    for moments in calls:
        total.merge(moments)
    return total


def _permuted(table: dict[str, Calls], alignment: Alignment) -> dict[str, Calls]:
    result = {}
    for name, calls in table.items():
        parameter = f"{name}.weight" if name else "weight"
        if parameter not in alignment.spec.shapes:
            raise ValueError(f"alignments: the spec knows no tensor {parameter!r}, which was measured")
        index = dimension_indices(parameter, alignment.spec, alignment.permutations).get(0)
        result[name] = calls if index is None else tuple(m.permuted(index) for m in calls)
    return result


class CallCounter:
    """Which call of each layer this is, within the forward pass that runs."""

    def __init__(self) -> None:
        self._made: dict[str, int] = {}

    def start(self) -> None:
        """A new forward pass begins."""
        self._made.clear()

    def next(self, name: str) -> int:
        """The number of this call of the layer, 0 the first."""
        call = self._made.get(name, 0)
        self._made[name] = call + 1
        return call


def endpoint_statistics(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    samples: int | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> EndpointStatistics:
    """Means and variances of every linear and convolution output of every endpoint, in one read of ``data``.

    Args:
        models: the endpoints; left as they are. Aligned ones need not be measured: see
            :meth:`EndpointStatistics.permuted`.
        data: a loader of inputs or (inputs, targets).
        layers: names of the layers to measure; all that can be renormalized and are run where left out.
        samples: stop after so many; all of them where left out.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    if not models:
        raise ValueError("endpoints: expected at least one model")
    for k, model in enumerate(models):
        check_module(model, f"endpoints[{k}]")
    distinct = {id(model): model for model in models}  # one given twice is run once
    tables: dict[int, dict[str, list[ChannelMoments]]] = {key: {} for key in distinct}
    counters = {key: CallCounter() for key in distinct}
    handles = []
    try:
        for key, model in distinct.items():
            for name, layer in survey(model, layers)[0].items():
                handles.append(layer.register_forward_hook(_measure(name, tables[key], counters[key])))
        with evaluating(*distinct.values()):
            for batch in batches_of(data, "endpoint statistics", samples=samples, progress=progress):
                for key, model in distinct.items():
                    counters[key].start()
                    forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    frozen = {key: {n: tuple(calls) for n, calls in table.items()} for key, table in tables.items()}
    measured = tuple(frozen[id(model)] for model in models)
    for name in layers or ():
        if name not in measured[0]:
            raise ValueError(f"layers: {name!r} was never run on the data")
    return EndpointStatistics(measured)


def _measure(name: str, table: dict[str, list[ChannelMoments]], counter: CallCounter) -> Callable[..., None]:
    def hook(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        call = counter.next(name)
        calls = table.setdefault(name, [])
        if call == len(calls):
            calls.append(ChannelMoments())
        calls[call].update(output, channel_dim(layer, output))

    return hook
