"""Least squares as a candidate of the automatic choice.

A fit of whole weights answers well on the samples that it is made from, whatever it does on others. So it is first made from three
quarters of the kept samples and judged on the others, against the best of the other candidates. Only if it is nearer there, it is
made again from all of them. The samples are those on which the endpoints' outputs are kept, so no data is read. A layer's inputs and outputs
on all of them are held at a time, for every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from fastmatch._internal.batches import Forward, evaluating, samples_in
from fastmatch._internal.layer_calls import on_call
from fastmatch._internal.modules import copy_module
from fastmatch.renorm.layers import Layer, by_outputs, survey
from fastmatch.renorm.least_squares import CannotFit, LayerFit, fit_sequentially
from fastmatch.renorm.lockstep import TakesOtherPaths
from fastmatch.renorm.options import Renormalization
from fastmatch.renorm.outputs import PREFERENCE, Disagreement, disagreement
from fastmatch.renorm.probes import Probe, cuts_cleanly, part_of, size_of, spread

__all__ = ["Trial", "try_least_squares"]

HELD_OUT = 0.25
"""Fraction of the samples that is left out of the judged fit. They are spread over all of them: a last part would be of other classes where
loaders are sorted, and each fourth sample where they take classes in turn."""
FEWEST = 64
"""Samples that a trial takes: on a quarter of fewer, chance decides."""
BATCHES = 64
"""Batches that are used at most: each is a forward pass of every model, and all passes run side by side."""
WORK = 1e13
"""Multiplications that both fits may take; as many as VGG16 needs for 30,000 images of 32 x 32. Larger networks are fitted if the method is
named."""


MEMORY = 2**31
"""Bytes that a layer's inputs and outputs on all samples may take, those of all models together."""


class Trial(NamedTuple):
    """What came of the trial.

    Attributes:
        model: the fitted model; None if another candidate stays.
        told: what was found, or why nothing was tried.
        found: how the judged fit differs from the endpoints on samples that it was not made from.
    """

    model: nn.Module | None
    told: str
    found: Disagreement | None = None


# parameters: the merge, its endpoints, their outputs, the candidate to beat, and how models are run
def try_least_squares(
    model: nn.Module,
    ends: tuple[Sequence[nn.Module], Sequence[float]],
    probes: Sequence[Probe],
    best: nn.Module,
    layers: Sequence[str],
    forward: Forward,
    merges: int,
) -> Trial:
    """Fit ``model`` to its endpoints if that beats ``best`` on samples that it is not made from.

    Args:
        model: the merge; it is not changed.
        ends: the endpoints and their weights.
        probes: samples, and the endpoints' outputs on them.
        best: the best of the other candidates.
        layers: names of the layers to fit.
        forward: runs a model on a batch.
        merges: how many merges are tried; together they may take :data:`WORK`.
    """
    used = min(len(probes), BATCHES)
    probes = [probes[k * len(probes) // used] for k in range(used)]
    sizes = [size for probe in probes if (size := size_of(probe)) is not None]
    samples = sum(sizes)
    if len(sizes) < len(probes):
        return Trial(None, "least squares was not tried: the samples of a batch cannot be counted")
    if samples < FEWEST:
        return Trial(None, f"least squares was not tried: it takes {FEWEST} samples")
    work, memory = _work(model, layers, probes[0], samples, forward)
    work, memory = 2 * merges * work, (1 + len(ends[0])) * memory
    if memory > MEMORY:
        return Trial(
            None,
            f"least squares was not tried: a layer's values take {memory:.1g} bytes, more than {MEMORY:.1g}",
        )
    if work > WORK:
        return Trial(
            None, f"least squares was not tried: it takes {work:.1g} multiplications, more than {WORK:.0g}"
        )
    held_out = _held_out(sizes)
    try:
        fitted = [
            part_of(probe, (~out).nonzero().flatten().tolist(), len(out))
            for probe, out in zip(probes, held_out, strict=True)
            if not bool(out.all())
        ]
        checked = max(fitted, key=lambda probe: len(probe.outputs[0]) if probe.outputs[0] is not None else 0)
        is_clean = cuts_cleanly(ends[0][0], checked, forward)
    except (RuntimeError, TypeError, ValueError, IndexError):  # batches of kinds that cannot be cut
        is_clean, fitted = False, []
    if not is_clean:
        return Trial(
            None, "least squares was not tried: a part of a batch does not give what the whole batch gives"
        )
    try:
        judged = _fit(model, ends, [p.batch for p in fitted], layers, forward)
    except (CannotFit, TakesOtherPaths) as reason:
        return Trial(None, f"least squares was not tried: {reason}")
    ours, theirs = (disagreement(m, probes, ends[1], forward, held_out=held_out) for m in (judged, best))
    assert ours is not None
    assert theirs is not None
    told = (
        f"on samples that least squares was not fitted to: least-squares {ours}, the best other one {theirs}"
    )
    if ours.distance() >= theirs.distance(PREFERENCE):
        return Trial(None, told, ours)
    try:
        return Trial(_fit(model, ends, [p.batch for p in probes], layers, forward), told, ours)
    except (CannotFit, TakesOtherPaths) as reason:
        return Trial(None, f"{told}; it cannot be fitted to all of them: {reason}", ours)


def _held_out(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Return which samples the judged fit does without, True for them, (samples,) for each batch."""
    found = torch.tensor([spread(k) < HELD_OUT * 2**32 for k in range(sum(sizes))], device="cpu")
    return list(found.split(list(sizes)))


def _fit(
    model: nn.Module,
    ends: tuple[Sequence[nn.Module], Sequence[float]],
    batches: Any,
    layers: Sequence[str],
    forward: Forward,
) -> nn.Module:
    new = copy_module(model)
    fits = [LayerFit(name, layer) for name, layer in survey(new, layers)[0].items()]
    options = Renormalization("least-squares", mode="sequential")
    fit_sequentially(new, fits, ends, list(batches), forward, options, progress=False)
    return new


def _work(
    model: nn.Module, layers: Sequence[str], probe: Probe, samples: int, forward: Forward
) -> tuple[float, float]:
    """Return (multiplications, bytes) of one fit: the sums of covariances and the solutions, and the largest layer's values in a model."""
    sums, solutions, largest = 0.0, 0.0, 0.0

    def see(layer: Layer, values: torch.Tensor, output: torch.Tensor) -> None:
        nonlocal sums, solutions, largest
        weight = by_outputs(layer, layer.weight)
        groups, features = int(getattr(layer, "groups", 1)), weight[0].numel()
        sums += output.numel() / len(weight) * groups * features**2
        # Where weights are zero, every output has a system of its own.
        solutions += (groups if bool((weight != 0).all()) else len(weight)) * features**3
        largest = max(largest, float(sum(t.numel() * t.element_size() for t in (values, output))))

    found = survey(model, layers)[0]
    with evaluating(model), ExitStack() as hooks:
        for layer in found.values():
            hooks.callback(
                on_call(layer, lambda values, output, layer=layer: see(layer, values, output)).remove
            )
        forward(model, probe.batch)
    share = samples / samples_in(probe.batch)
    return sums * share + solutions, largest * share
