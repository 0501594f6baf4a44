"""Weighted averages of models with equal architectures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from fastmatch.permute import LARGE
from fastmatch.states import State, check_finite, check_same_architecture, state_of

__all__ = ["check_weights", "copy_module", "merge", "merge_states", "remember_weights", "remembered_weights"]

_NOTE = "fastmatch_merge_weights"


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


def remember_weights(model: nn.Module, weights: Sequence[float]) -> nn.Module:
    """Notes on a merge what it is made of, so that renormalization need not be told; copies keep the note."""
    model.__dict__[_NOTE] = tuple(float(w) for w in weights)
    return model


def remembered_weights(model: nn.Module) -> tuple[float, ...] | None:
    """The weights a module was merged with; None where it does not remember any."""
    return model.__dict__.get(_NOTE)


def copy_module(model: nn.Module, memo: dict[int, torch.Tensor] | None = None) -> nn.Module:
    """A deep copy, also of modules that hold computed tensors, as torch.nn.utils.prune leaves them.

    ``memo`` says what stands for the tensors of some ids, as for :func:`copy.deepcopy`.
    """
    memo = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def with_state(model: nn.Module, state: State) -> nn.Module:
    """A copy of ``model`` that holds ``state``; ties between its parameters stay.

    It takes the tensors of ``state`` over where they are laid out as the model's: a copy of the old values,
    to be overwritten, would cost as much time and memory as the whole merge.
    """
    old = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    taken: dict[int, torch.Tensor] = {}
    for name, tensor in old.items():
        new = state[name]
        if type(tensor) in (torch.Tensor, nn.Parameter) and _same_layout(tensor, new):
            is_parameter = isinstance(tensor, nn.Parameter)
            taken.setdefault(id(tensor), nn.Parameter(new, tensor.requires_grad) if is_parameter else new)
    copied = copy_module(model, taken)
    with torch.no_grad():
        for name, tensor in copied.state_dict().items():
            if isinstance(tensor, torch.Tensor) and id(old[name]) not in taken:
                tensor.copy_(state[name])
    return copied


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether ``b`` can be put in ``a``'s place: alike in all but values, and in memory of its own."""
    alike = all(getattr(a, what) == getattr(b, what) for what in ("shape", "dtype", "device", "layout"))
    return alike and a.stride() == b.stride() and a.data_ptr() != b.data_ptr()
