"""Statistics of the endpoints: measured once, permuted with their models, and mixed into targets for any merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    batches_of,
    check_data,
    check_module,
    default_forward,
    device_of,
    evaluating,
)
from fastmatch._internal.checks import check_choice, check_number
from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.divided import check_in_parts
from fastmatch._internal.ranks import current, on_all_ranks
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.shared_data import read_alike, share_of_rank
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.apply import dimension_indices
from fastmatch.renorm.layers import channel_dim, survey
from fastmatch.renorm.on_ranks import measured_on_ranks
from fastmatch.renorm.options import TargetMix
from fastmatch.renorm.probes import Probe, ProbeRecorder, joined
from fastmatch.renorm.targets import Target, layer_average, mixed_target
from fastmatch.statistics.finite import FiniteNotes
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["CallCounter", "Calls", "EndpointStatistics", "endpoint_statistics"]

Calls: TypeAlias = tuple[ChannelMoments, ...]
"""The moments of a layer's first, second, ... call in a forward pass."""


@dataclass(frozen=True, eq=False)
class EndpointStatistics:
    """Statistics of each layer's output in each endpoint; measured once, used for every merge.

    Example:
        >>> statistics = fm.endpoint_statistics([model_a, model_b], loader)
        >>> merged = fm.merge([model_a, model_b], [0.25, 0.75])
        >>> repaired = fm.renormalize(merged, statistics, loader, "repair")

    Attributes:
        calls: per endpoint, layer name -> the moments of the layer's first, second, ... call in a forward
            pass. A module that a network uses twice has two.
        probes: samples and the endpoints' outputs on them, which ``method="auto"`` compares with those of the merge.
    """

    calls: tuple[dict[str, Calls], ...]
    probes: tuple[Probe, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return f"EndpointStatistics({len(self.calls)} endpoints, {len(self.calls[0])} layers)"

    @property
    def models(self) -> tuple[dict[str, ChannelMoments], ...]:
        """Per endpoint, layer name -> moments pooled over calls."""
        return tuple({name: pooled(calls) for name, calls in table.items()} for table in self.calls)

    def __add__(self, other: EndpointStatistics) -> EndpointStatistics:
        """The endpoints of both, this one's first. Each model can be measured separately.

        Outputs are kept only if both were measured on the same batches, in the same order. Without them ``method="auto"`` has
        nothing to judge by: see :func:`fastmatch.renormalize`.
        """
        if set(self.calls[0]) != set(other.calls[0]):
            raise ValueError("other: expected statistics of the same layers")
        return EndpointStatistics((*self.calls, *other.calls), joined(self.probes, other.probes))

    def permuted(self, *alignments: Alignment | None) -> EndpointStatistics:
        """Return the statistics of the aligned endpoints. No model is run: only the channels are permuted.

        Example:
            >>> alignment = fm.align(model_a, model_b, x)
            >>> both = fm.endpoint_statistics([model_a, model_b], loader)
            >>> both = both.permuted(None, alignment)  # those of model_a and alignment.apply(model_b)

        Args:
            alignments: one per endpoint; None for an endpoint that is not permuted.

        Raises:
            ValueError: another number of alignments, or a spec without a layer that was measured.
        """
        if len(alignments) != len(self.calls):
            raise ValueError(
                f"alignments: expected {len(self.calls)}, one per endpoint, got {len(alignments)}"
            )
        return EndpointStatistics(
            tuple(
                table if alignment is None else _permuted(table, alignment)
                for table, alignment in zip(self.calls, alignments, strict=True)
            ),
            self.probes,
        )

    def targets(
        self,
        weights: Sequence[float],
        *,
        target: TargetMix = "weighted",
        std_factor: float = 1.0,
        call: int | None = None,
    ) -> dict[str, Target]:
        """Return the target statistics of every layer that each endpoint has run: name -> (mu*, sigma*), float64.

        Example:
            >>> statistics = fm.endpoint_statistics([model_a, model_b], loader)
            >>> targets = statistics.targets([0.5, 0.5])

        Args:
            weights: one per endpoint.
            target, std_factor: see :class:`fastmatch.Renormalization`.
            call: position of the call of the layer, 0 for the first. None pools over calls, and so does a
                position that an endpoint does not have.

        Raises:
            ValueError: the weights do not fit, or an option is out of range.
        """
        check_choice("target", target, TargetMix)
        check_number("std_factor", std_factor, exclusive=True)
        weights = check_weights(weights, len(self.calls))
        if target == "equal":
            weights = [sum(weights) / len(weights)] * len(weights)
        found = {}
        for name in (name for name in self.calls[0] if all(name in table for table in self.calls)):
            moments = [
                table[name][call] if call is not None and call < len(table[name]) else pooled(table[name])
                for table in self.calls
            ]
            mixed = mixed_target(moments, weights, std_factor)
            found[name] = layer_average(mixed) if target == "average" else mixed
        return found


_ALONG_OUTPUTS = (
    "bias", "bias_orig", "weight", "weight_orig", "parametrizations.weight.original", "parametrizations.weight.original0",
)  # fmt: skip
"""Tensors of a layer whose first dimension is its outputs; that of GPT-2's weight is its inputs, but it has a bias."""


def pooled(calls: Calls) -> ChannelMoments:
    """Return the moments over all calls of a layer."""
    total = ChannelMoments()
    for moments in calls:
        total.merge(moments)
    return total


def _permuted(table: dict[str, Calls], alignment: Alignment) -> dict[str, Calls]:
    result = {}
    for name, calls in table.items():
        # Along a bias are the outputs, wherever a weight has them.
        places = (f"{name}.{own}".removeprefix(".") for own in _ALONG_OUTPUTS)
        along = next((place for place in places if place in alignment.spec.shapes), None)
        if along is None:
            raise ValueError(f"alignments: the spec has no tensor of layer {name!r}, which was measured")
        index = dimension_indices(along, alignment.spec, alignment.permutations).get(0)
        result[name] = calls if index is None else tuple(m.permuted(index) for m in calls)
    return result


class CallCounter:
    """Counts the calls of each layer within one forward pass."""

    def __init__(self) -> None:
        self._made: dict[str, int] = {}

    def start(self) -> None:
        """Begin a new forward pass."""
        self._made.clear()

    def next(self, name: str) -> int:
        """Return the position of this call of the layer, 0 for the first."""
        call = self._made.get(name, 0)
        self._made[name] = call + 1
        return call


@on_all_ranks
def endpoint_statistics(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    samples: int | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> EndpointStatistics:
    """Measure mean and variance of every linear and convolution output of every endpoint.

    Example:
        >>> statistics = fm.endpoint_statistics([model_a, model_b], loader, samples=256)

    Args:
        models: the endpoints; they are not changed. Aligned models need not be measured again: see
            :meth:`EndpointStatistics.permuted`.
        data: a loader of inputs or (inputs, targets); read once for all endpoints.
        layers: names of the layers to measure; None takes all that can be renormalized and are run.
        samples: stop after this many samples; None reads all of them.
        forward: ``forward(model, batch)`` runs a model on a batch.
        progress: show a progress bar; None shows it on a terminal.

    In a torch.distributed process group the ranks share the batches, and all of them get the same statistics on any number of
    ranks. With ``samples``, and of data whose number of batches is not known, each rank reads all.

    Returns:
        An :class:`EndpointStatistics` with float64 moments, pooled over all samples and positions, and the outputs on
        1024 samples that are spread over the data.

    Raises:
        TypeError: a model is not a torch module.
        ValueError: no model, no data, a named layer that does not exist or was never run, or activations that are
            not finite; the batch and the layer are named.
    """
    ranks = current()
    if not models:
        raise ValueError("models: expected at least one")
    check_data(data)
    for k, model in enumerate(models):
        check_module(model, f"models[{k}]")
        check_in_parts(model, f"models[{k}]")
    if not ranks.is_nested:
        options = {"layers": layers, "samples": samples, "forward": forward}
        named = {f"models[{k}]": model for k, model in enumerate(models)}
        check_same_on_ranks(ranks, "endpoint_statistics", options, named)
    distinct = {id(model): model for model in models}  # a model given twice is run once
    tables: dict[int, dict[str, list[ChannelMoments]]] = {key: {} for key in distinct}
    counters = {key: CallCounter() for key in distinct}
    notes = {key: FiniteNotes() for key in distinct}
    recorder = ProbeRecorder()
    handles = []
    try:
        for key, model in distinct.items():
            for name, layer in survey(model, layers)[0].items():
                handles.append(
                    layer.register_forward_hook(_measure(name, tables[key], counters[key], notes[key]))
                )

        def run(batch: Any) -> None:
            outputs = {}
            for key, model in distinct.items():
                counters[key].start()
                notes[key].next_batch()
                outputs[key] = forward(model, batch)
            recorder.add(batch, [outputs[id(model)] for model in models])

        def check() -> None:
            for k, key in enumerate(distinct):
                notes[key].check(f"models[{k}]")

        with evaluating(*distinct.values()):
            share = None if samples is not None else share_of_rank(data, *distinct.values())
            if share is None:
                every = batches_of(data, "endpoint statistics", samples=samples, progress=progress)
                for batch in read_alike(every, ranks, *distinct.values()):
                    run(batch)
                check()
            else:
                for note in notes.values():
                    note.batch = share.first - 1
                recorder.next = share.first
                device = device_of(models[0])
                measured_on_ranks(share, list(tables.values()), recorder, run, check, device, progress)
    finally:
        for handle in handles:
            handle.remove()
    frozen = {key: {n: tuple(calls) for n, calls in table.items()} for key, table in tables.items()}
    measured = tuple(frozen[id(model)] for model in models)
    for name in layers or ():
        if name not in measured[0]:
            raise ValueError(f"layers: {name!r} was never run on the data")
    return EndpointStatistics(measured, recorder.probes())


def _measure(
    name: str, table: dict[str, list[ChannelMoments]], counter: CallCounter, notes: FiniteNotes
) -> Callable[..., None]:
    def hook(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        call = counter.next(name)
        calls = table.setdefault(name, [])
        if call == len(calls):
            calls.append(ChannelMoments())
        calls[call].update(output, channel_dim(layer, output))
        notes.see(name, calls[call])

    return hook
