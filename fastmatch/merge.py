"""Weighted averages of models with equal architectures."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from fastmatch.permute import LARGE
from fastmatch.states import State, check_same_architecture, state_of

__all__ = ["check_weights", "merge", "merge_states"]


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight a model; equal ones where left out."""
    if weights is None:
        return [1.0 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one a model, got {len(values)}")
    if not all(abs(w) < float("inf") for w in values):
        raise ValueError(f"weights: expected finite numbers, got {values}")
    return values


def merge_states(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """``sum_k weights[k] * states[k]`` for every floating point tensor, in its own dtype.

    Sums run in float32 at least. Integer buffers (step counters) are the first model's. Running statistics
    of batch norm are averaged like the rest, which is only a stand-in: reset them on data
    (:func:`fastmatch.renormalize` with ``method="reset"``).
    """
    if not states:
        raise ValueError("models: expected at least one")
    alphas = check_weights(weights, len(states))
    for k, state in enumerate(states[1:], start=1):
        check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
    merged: dict[str, torch.Tensor] = {}
    for name, first in states[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            merged[name] = first.clone()
            continue
        tensors = [state[name] for state in states]
        if _has_kernel(tensors):
            from fastmatch.kernels import dispatch

            merged[name] = dispatch.permute_merge(tensors, alphas)
            continue
        work = torch.promote_types(first.dtype, torch.float32)
        total = first.to(work) * alphas[0]
        for state, alpha in zip(states[1:], alphas[1:], strict=True):
            total.add_(state[name].to(device=total.device, dtype=work), alpha=alpha)
        merged[name] = total.to(first.dtype)
    return merged


def _has_kernel(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one kernel can read each of these once and write their sum: alike, on the CPU, and large."""
    first = tensors[0]
    return (
        first.numel() >= LARGE
        and first.is_floating_point()
        and first.itemsize >= 2
        and all(t.dtype == first.dtype and t.device.type == "cpu" for t in tensors)
    )


@overload
def merge(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module: ...
@overload
def merge(models: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]: ...
def merge(
    models: Sequence[nn.Module] | Sequence[State], weights: Sequence[float] | None = None
) -> nn.Module | dict[str, torch.Tensor]:
    """The weighted average of models (a new module like the first) or of state dicts (a new dict).

    Example:
        >>> merged = fm.merge([model_a, model_b_aligned], weights=[0.5, 0.5])

    Args:
        models: modules or state dicts of the same architecture, already aligned.
        weights: one a model; equal ones where left out. They need not sum to one.

    Raises:
        ValueError: architectures differ, or the weights do not fit.
    """
    if not models:
        raise ValueError("models: expected at least one")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    merged = merge_states(states, weights)
    first = models[0]
    return merged if isinstance(first, Mapping) else with_state(first, merged)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of ``model`` that holds ``state``; ties between its parameters stay."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(state[name])
    return new
