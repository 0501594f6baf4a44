"""Straight-through matching: gradients of the merge's loss look for the permutation (Ainsworth et al. 2022, 3.3).

A free copy B~ of the parameters is trained. Forward, the midpoint of A and of B permuted to lie closest to B~ is run;
backward, the gradient of its loss goes straight through that projection to B~.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import batches_of, device_of, evaluating, split_batch
from fastmatch._internal.states import State, state_of
from fastmatch.matching.weights import match_weights
from fastmatch.permutations.alignment import Matching
from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["Loss", "match_straight_through"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def match_straight_through(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    epochs: int = 5,
    learning_rate: float = 1e-2,
    loss: Loss = F.cross_entropy,
    start: Permutations | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    progress: bool | None = None,
) -> Matching:
    """Finds the permutations of B's units whose midpoint with A has the least loss on ``data``.

    Begins with weight matching (from ``start``), goes through the data ``epochs`` times with Adam, and measures the
    midpoint's loss before the first and after each of them, in a read of its own: what it returns is the best of
    these, so never worse on ``data`` than weight matching. Networks run in eval mode, batch norm with the midpoint of
    both running statistics.

    Args:
        model_a, model_b: modules of the traced architecture; A is the reference. Both are left as they are.
        spec: which axes move together.
        data: batches of (inputs, targets), read ``2 * epochs + 1`` times.
        epochs: passes of training.
        learning_rate: Adam's, on the free copy.
        loss: of a batch's outputs and targets.
        start, seed, max_sweeps, tolerance, include: of the projections, as in weight matching.
        progress: show bars; None shows them on a terminal.

    Returns:
        A :class:`Matching` whose ``objective`` is the negated mean loss of the midpoint, of weight matching and of
        the best epoch.

    Raises:
        ValueError: ``epochs`` or ``learning_rate`` is no positive number, or the data yields nothing.
    """
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs: expected a whole number of at least 1, got {epochs}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
    options: dict[str, Any] = {
        "max_sweeps": max_sweeps, "tolerance": tolerance, "include": include, "progress": False,
    }  # fmt: skip
    found = match_weights(a, b, spec, start=start, seed=seed, **options)
    permutations, solves = found.permutations, found.solves
    names = {name for name, _ in model_a.named_parameters()}
    free = {name: a[name].clone().requires_grad_() for name in names}
    descent = torch.optim.Adam(free.values(), lr=learning_rate)
    first = best = _mean_loss(model_a, _middle(a, b, spec, permutations), data, loss, progress)
    chosen = permutations
    for epoch in range(epochs):
        title = f"straight-through, epoch {epoch + 1}"
        with evaluating(model_a):
            for step, batch in enumerate(batches_of(data, title, progress=progress)):
                aim = {**b, **{name: value.detach() for name, value in free.items()}}
                projected = match_weights(
                    aim, b, spec, start=permutations, seed=seed + epoch + step, **options
                )
                permutations, solves = projected.permutations, solves + projected.solves
                middle = _middle(a, b, spec, permutations)
                descent.zero_grad()
                with torch.enable_grad():
                    for (
                        name,
                        value,
                    ) in free.items():  # the value of the midpoint, the gradient of the free copy
                        middle[name] = middle[name] + 0.5 * (value - value.detach())
                    _loss_of(model_a, middle, batch, loss).backward()
                descent.step()
        value = _mean_loss(model_a, _middle(a, b, spec, permutations), data, loss, progress)
        if value < best or best != best:  # anything is better than NaN
            best, chosen = value, permutations
    return Matching(chosen, "straight-through", (-first, -best), sweeps=epochs, solves=solves)


def _middle(a: State, b: State, spec: PermutationSpec, permutations: Permutations) -> dict[str, torch.Tensor]:
    """The midpoint of A and the permuted B; what is no floating point number is A's."""
    moved = apply_permutations(dict(b), spec, permutations)
    return {
        name: value.lerp(moved[name].to(value), 0.5) if value.is_floating_point() else value
        for name, value in a.items()
    }


def _named(model: nn.Module) -> set[str]:
    """One name for each parameter and buffer: tied ones have several in a state dict."""
    return {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}


def _loss_of(model: nn.Module, state: State, batch: Any, loss: Loss) -> torch.Tensor:
    inputs, targets = split_batch(batch)
    if not isinstance(inputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ValueError("data: expected (inputs, targets) pairs of tensors")
    device = device_of(model)
    named = {name: state[name] for name in _named(model) if name in state}
    return loss(torch.func.functional_call(model, named, (inputs.to(device),)), targets.to(device))


def _mean_loss(
    model: nn.Module, state: State, data: Iterable[Any], loss: Loss, progress: bool | None
) -> float:
    total, count = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in batches_of(data, "loss of the midpoint", progress=progress):
            value = float(_loss_of(model, state, batch, loss))
            size = len(split_batch(batch)[0])
            total += size * value
            count += size
    return total / count
