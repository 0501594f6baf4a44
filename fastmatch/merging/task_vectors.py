"""Task vectors: what fine-tuning changed in one model, added to another one in its order of units."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fastmatch._internal.checks import check_number
from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, check_finite, check_same_architecture, state_of, working_dtype
from fastmatch.permutations.alignment import Alignment

__all__ = ["move_task", "task_vector"]

Model = TypeVar("Model", nn.Module, State)

RUNNING = ("running_mean", "running_var")
"""Measured, not learned: the difference of two variances is no variance."""


@torch.inference_mode(False)
def task_vector(tuned: nn.Module | State, base: nn.Module | State) -> dict[str, torch.Tensor]:
    """Return ``tuned - base`` of every learned tensor (Ilharco et al. 2023), in float32 or wider.

    Integer buffers and the running statistics of batch norm are left out.

    Example:
        >>> difference = fm.task_vector(model_b, model_a)

    Args:
        tuned: the fine-tuned model, or its state dict.
        base: the model that it was fine-tuned from.

    Raises:
        TypeError: one is neither a module nor a state dict.
        ValueError: the architectures differ, or a model holds NaN or infinity.
    """
    one, two = state_of(tuned, "tuned"), state_of(base, "base")
    check_same_architecture(two, one, "base", "tuned")
    check_finite(one, "tuned")
    check_finite(two, "base")
    found = {}
    for name, tensor in one.items():
        if tensor.is_floating_point() and not name.endswith(RUNNING):
            work = working_dtype(tensor.dtype)
            found[name] = tensor.to(work) - two[name].to(device=tensor.device, dtype=work)
    return found


@torch.inference_mode(False)
def move_task(
    target: Model,
    tuned: nn.Module | State,
    base: nn.Module | State,
    alignment: Alignment,
    *,
    scale: float = 1.0,
) -> Model:
    """Return ``target + scale * P(tuned - base)``: fine-tuning of one base model, carried to another (TransFusion).

    P reorders the units as the base's alignment to the target says. So nobody has to fine-tune a new release of a base model again
    where the old one's fine-tuning fits.

    Example:
        >>> tuned_b = fm.merge([model_b, model_a], [0.9, 0.1])  # stands for a fine-tuned model_b
        >>> alignment = fm.align(model_a, model_b, x)  # of the bases
        >>> tuned_a = fm.move_task(model_a, tuned_b, model_b, alignment)

    Args:
        target: the base model that shall learn the task; it is not changed.
        tuned: the other base model, fine-tuned.
        base: the other base model itself.
        alignment: of ``base`` to ``target``: ``fm.align(target, base, x)``.
        scale: what the difference is multiplied by; below 0 the task is forgotten.

    Returns:
        A new module, or a state dict, like ``target``. Buffers are the target's; measure running statistics of batch norm again
        (``fm.renormalize(new, None, data, "reset")``).

    Raises:
        TypeError: something is neither a module nor a state dict, or ``alignment`` is not an :class:`Alignment`.
        ValueError: architectures differ, or a model holds NaN or infinity.

    Source:
        Ilharco et al. 2023 (task arithmetic); Rinaldi et al. 2025 (TransFusion).
    """
    if not isinstance(alignment, Alignment):
        raise TypeError(
            f"alignment: expected what fm.align(target, base, x) returns; got {type(alignment).__name__}"
        )
    check_number("scale", scale, least=float("-inf"))
    state = state_of(target, "target")
    check_same_architecture(state, state_of(base, "base"), "target", "base")
    check_finite(state, "target")
    difference = task_vector(tuned, base)
    rest = {name: tensor for name, tensor in state.items() if name not in difference}
    moved = alignment.apply({**rest, **difference})
    new = dict(state)
    for name in difference:
        change = moved[name].to(state[name].device)
        new[name] = torch.add(state[name].to(change.dtype), change, alpha=scale).to(state[name].dtype)
    if isinstance(target, nn.Module):
        return with_state(target, new)
    return {name: tensor.clone() if tensor is state[name] else tensor for name, tensor in new.items()}
