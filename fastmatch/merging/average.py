"""Weighted averages of models with equal architectures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from fastmatch._internal.coefficients import check_weights, remember_weights
from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, check_finite, check_same_architecture, state_of
from fastmatch.permutations.apply import LARGE

__all__ = ["merge", "merge_states"]


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
            from fastmatch_kernels import ops as kernels

            merged[name] = kernels.permute_merge(tensors, alphas)
            continue
        work = torch.promote_types(first.dtype, torch.float32)
        total = first.to(work) * alphas[0]
        for state, alpha in zip(states[1:], alphas[1:], strict=True):
            total.add_(state[name].to(device=total.device, dtype=work), alpha=alpha)
        merged[name] = total.to(first.dtype)
    return merged


def _has_kernel(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one kernel can read each of these once and write their sum: alike, on the CPU, and large.

    Of four times as many where torch makes no copies in a wider type: its passes are quick while the sum is in cache.
    """
    first = tensors[0]
    return (
        first.numel() >= (LARGE if first.itemsize < 4 else 4 * LARGE)
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

    A merged module remembers its weights (in memory and in pickles, not in its state dict), for
    :func:`fastmatch.renormalize`.

    Args:
        models: modules or state dicts of the same architecture, already aligned.
        weights: one a model; equal ones where left out. A sum other than one scales the network; it is warned of.

    Raises:
        ValueError: architectures differ, the weights do not fit, or a model holds NaN or infinity.

    Warns:
        UserWarning: the weights do not sum to one.
    """
    if not models:
        raise ValueError("models: expected at least one")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    for k, state in enumerate(states):
        check_finite(state, f"models[{k}]")
    total = sum(check_weights(weights, len(models)))
    if abs(total - 1.0) > 1e-6:
        warnings.warn(
            f"merge: weights sum to {total:g}, not one: every tensor is scaled by that", stacklevel=2
        )
    merged = merge_states(states, weights)
    first = models[0]
    if isinstance(first, Mapping):
        return merged
    return remember_weights(with_state(first, merged), check_weights(weights, len(models)))
