"""Straight-through matching: descend the loss of the midpoint over permutations (Ainsworth et al. 2022, section 3.3).

A free copy of the parameters is trained. The forward pass runs the midpoint of A and of B, permuted to be closest to
the copy. The backward pass gives the gradient of the midpoint's loss to the copy, as if the projection onto
permutations were the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import (
    arguments_for,
    batches_of,
    check_data,
    device_of,
    evaluating,
    prediction_of,
    samples_in,
    split_batch,
)
from fastmatch._internal.checks import check_integer, check_number
from fastmatch._internal.class_targets import check_class_outputs, check_class_targets
from fastmatch._internal.shared_data import read_in_step
from fastmatch._internal.states import State, check_same_architecture, state_of
from fastmatch.matching.matcher import Matcher, Model, check_matcher, modules_of
from fastmatch.matching.weights import WeightMatching, check_unbalanced, match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Loss", "StraightThrough"]

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``loss(outputs, targets)`` returns a scalar."""


@dataclass(frozen=True, eq=False)
class StraightThrough(Matcher):
    """Match units by gradients: minimize the loss of the midpoint of A and the permuted B on data.

    Begins at weight matching and trains for ``epochs``. The loss of the midpoint is measured before the first epoch
    and after each; the permutations of the lowest loss are the result. On ``data`` they are never worse than weight
    matching. Networks run in eval mode; batch norm uses the midpoint of both running statistics.

    Example:
        >>> alignment = fm.align(model_a, model_b, x, fm.StraightThrough(loader, epochs=1))
        >>> before, after = alignment.matching.objective
        >>> after >= before
        True

    Args:
        data: batches of (inputs, targets), or mappings with ``"labels"``, read ``2 * epochs + 1`` times; not an
            iterator, which can be read only once.
        epochs: passes over the data that train the free copy.
        learning_rate: Adam's step size on the free copy.
        loss: ``loss(outputs, targets)`` of a batch, the mean over it; of output objects, the ``logits`` are given.
        projection: the options of weight matching, by which the free copy is projected onto permutations. Its
            ``init`` and ``seed`` are those of the first projection; the later ones begin at the one before, with
            the next seed.

    Raises:
        ValueError: ``epochs`` or ``learning_rate`` is out of range.
        TypeError: ``data`` is not an iterable of batches that can be read again, ``loss`` is not callable, or
            ``projection`` is not a :class:`WeightMatching`.

    Cost: one forward and backward pass and one weight matching per batch, so it is meant for narrow networks.
    """

    data: Iterable[Any] = field(repr=False)
    epochs: int = 5
    learning_rate: float = 1e-2
    loss: Loss = field(default=F.cross_entropy, repr=False)
    projection: WeightMatching = WeightMatching()

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, least=1)
        check_data(self.data, reads=2 * self.epochs + 1)
        check_number("learning_rate", self.learning_rate, exclusive=True)
        if not callable(self.loss):
            raise TypeError(
                f"loss: expected a function of outputs and targets, got {type(self.loss).__name__}"
            )
        check_matcher("projection", self.projection, WeightMatching)
        check_unbalanced(self.projection)

    @torch.inference_mode(False)  # it needs gradients, whatever mode the caller is in
    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A; see :meth:`Matcher.match`. Both models are modules.

        Returns:
            A :class:`Matching` whose ``objective`` is the negated mean loss of the midpoint, by weight matching and
            by the result.

        Raises:
            TypeError: a model is a state dict, which cannot be run.
            ValueError: ``data`` does not yield targets, or the models differ in the size of a tensor.
        """
        model, _ = modules_of(model_a, model_b)
        # The loss is that of the midpoint, which takes all tensors of both.
        check_same_architecture(state_of(model_a, "model_a"), state_of(model_b, "model_b"))
        descent = _Descent(self, model, state_of(model_b, "model_b"), spec)
        first = best = descent.mean_loss(progress)
        chosen = descent.permutations
        for epoch in range(self.epochs):
            title = f"straight-through, epoch {epoch + 1}"
            with evaluating(model):
                batches = read_in_step(batches_of(self.data, title, progress=progress), model)
                for step, batch in enumerate(batches):
                    descent.step(batch, seed=self.projection.seed + epoch + step)
            value = descent.mean_loss(progress)
            if value < best:
                best, chosen = value, descent.permutations
        return Matching(chosen, "StraightThrough", (-first, -best), sweeps=self.epochs, solves=descent.solves)


class _Descent:
    """The free copy, its optimizer, and the permutations closest to it."""

    def __init__(self, options: StraightThrough, model: nn.Module, b: State, spec: PermutationSpec) -> None:
        self.options, self.model, self.spec = options, model, spec
        self.a, self.b = state_of(model, "model_a"), b
        found = match_weights(self.a, b, spec, options.projection, progress=False)
        self.permutations, self.solves = found.permutations, found.solves
        names = {name for name, _ in model.named_parameters()}
        self.free = {name: self.a[name].clone().requires_grad_() for name in names}
        self.optimizer = torch.optim.Adam(self.free.values(), lr=options.learning_rate)

    def step(self, batch: Any, seed: int) -> None:
        """Project the free copy, and descend the loss of the midpoint on one batch."""
        target = {**self.b, **{name: value.detach() for name, value in self.free.items()}}
        projection = replace(self.options.projection, init=self.permutations, seed=seed)
        found = match_weights(target, self.b, self.spec, projection, progress=False)
        self.permutations, self.solves = found.permutations, self.solves + found.solves
        middle = _midpoint(self.a, self.b, self.spec, self.permutations)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            for name, value in self.free.items():  # the value of the midpoint, the gradient of the free copy
                middle[name] = middle[name] + 0.5 * (value - value.detach())
            _loss_of(self.model, middle, batch, self.options.loss).backward()
        self.optimizer.step()

    def mean_loss(self, progress: bool | None) -> float:
        """Return the mean loss of the midpoint over the data."""
        state = _midpoint(self.a, self.b, self.spec, self.permutations)
        total, count = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            batches = batches_of(self.options.data, "loss of the midpoint", progress=progress)
            for number, batch in enumerate(read_in_step(batches, self.model)):
                value = float(_loss_of(self.model, state, batch, self.options.loss))
                if not math.isfinite(value):
                    raise ValueError(
                        f"data: the midpoint's loss on batch {number} (counted from 0) is {value}"
                    )
                size = samples_in(batch)
                total += size * value
                count += size
        return total / count


def _midpoint(
    a: State, b: State, spec: PermutationSpec, permutations: Permutations
) -> dict[str, torch.Tensor]:
    """The midpoint of A and the permuted B; tensors that are not floating point are A's."""
    moved = apply_permutations(dict(b), spec, permutations)
    return {
        name: value.lerp(moved[name].to(value), 0.5) if value.is_floating_point() else value
        for name, value in a.items()
    }


def _loss_of(model: nn.Module, state: State, batch: Any, loss: Loss) -> torch.Tensor:
    inputs, targets = split_batch(batch)
    if not isinstance(targets, torch.Tensor):
        raise ValueError(
            "data: expected (inputs, targets) pairs, or mappings with labels, whose targets are tensors"
        )
    args, kwargs = arguments_for(model, inputs)
    # One name for each parameter and buffer: tied ones have several in a state dict.
    names = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}
    named = {name: state[name] for name in names if name in state}
    output = prediction_of(torch.func.functional_call(model, named, args, kwargs))
    if loss is F.cross_entropy:
        needed = "loss: needed, because cross entropy is for classes; give StraightThrough(data, loss=...)"
        check_class_outputs(output, needed)
        check_class_targets(targets, needed)
    return loss(output, targets.to(device_of(model)))
