"""Weighted averages of models with equal architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import nn

from fastmatch._internal.allowed import Biases
from fastmatch._internal.callers import warn_user
from fastmatch._internal.checks import check_choice
from fastmatch._internal.coefficients import check_weights, is_one, remember_weights, warn_of_scale
from fastmatch._internal.computed_weights import check_equal_parts, fixed_parts
from fastmatch._internal.divided import local_part
from fastmatch._internal.modules import with_state
from fastmatch._internal.ranks import is_divided
from fastmatch._internal.states import (
    State,
    check_finite,
    check_models,
    check_same_architecture,
    state_of,
    working_dtype,
)
from fastmatch.merging.biases import bias_depths, norms_in, zeroed_biases
from fastmatch.permutations.apply import LARGE

__all__ = ["Biases", "merge", "merge_states"]


@torch.inference_mode(False)
def merge_states(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """Return ``sum_k weights[k] * states[k]`` for every floating point tensor, in its own dtype.

    Sums run in float32 or wider. Integer buffers (step counters) are the first model's. Running statistics of batch
    norm are averaged like everything else, which is only an approximation: measure them on data
    (:func:`fastmatch.renormalize` with ``method="reset"``). Masks of torch.nn.utils.prune and tensors of parametrizations
    must be equal in all models, and are the first model's. Equal tensors on the CPU stay as they are.
    """
    if not states:
        raise ValueError("models: expected at least one")
    alphas = check_weights(weights, len(states))
    for k, state in enumerate(states[1:], start=1):
        check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
    merged: dict[str, torch.Tensor] = {}
    fixed = fixed_parts(states[0])
    keeps_scale = is_one(sum(alphas))
    for name, first in states[0].items():
        if name in fixed:
            for k, state in enumerate(states):
                check_equal_parts(name, local_part(first), local_part(state[name]), fixed, f"models[{k}]")
        if name in fixed or not (first.is_floating_point() or first.is_complex()):
            merged[name] = first.clone()
            continue
        tensors = [state[name] for state in states]
        if len({is_divided(tensor) for tensor in tensors}) > 1:
            raise TypeError(
                f"models: tensor {name!r} is divided among ranks (DTensor) in some models and whole in others; expected one kind"
            )
        if keeps_scale and _are_equal(tensors):
            merged[name] = first.clone()
            continue
        if _has_kernel(tensors):
            from fastmatch_kernels import ops as kernels

            merged[name] = kernels.permute_merge(tensors, alphas)
            continue
        work = working_dtype(first.dtype)
        total = first.to(work) * alphas[0]
        for state, alpha in zip(states[1:], alphas[1:], strict=True):
            total.add_(state[name].to(device=total.device, dtype=work), alpha=alpha)
        merged[name] = total.to(first.dtype)
    return merged


def _are_equal(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether tensors in memory are equal: indices in a floating point type, as CLIP has them, bear no rounding."""
    first = tensors[0]
    if any(t.device.type != "cpu" or t.dtype != first.dtype or is_divided(t) for t in tensors):
        return False
    return all(torch.equal(first, other) for other in tensors[1:])  # each stops at the first difference


def _has_kernel(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the kernel that reads each tensor once is faster: for one dtype and device, on CPU if large.

    Threshold: 1M elements in half precision, 4M otherwise, because torch needs no copies in a wider type there and is
    fast while the sum is in cache.
    """
    first = tensors[0]
    if not first.is_floating_point() or first.itemsize < 2 or is_divided(first):
        return False
    if any(t.dtype != first.dtype or t.device != first.device for t in tensors):
        return False
    if first.device.type == "cuda":
        return first.itemsize <= 4
    return first.device.type == "cpu" and first.numel() >= (LARGE if first.itemsize < 4 else 4 * LARGE)


@overload
def merge(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None, *, biases: Biases = "average"
) -> nn.Module: ...
@overload
def merge(
    models: Sequence[State], weights: Sequence[float] | None = None, *, biases: Biases = "average"
) -> dict[str, torch.Tensor]: ...
def merge(
    models: Sequence[nn.Module] | Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    biases: Biases = "average",
) -> nn.Module | dict[str, torch.Tensor]:
    """Average models that are aligned already: ``sum_k weights[k] * models[k]``.

    A merged module carries a note of its weights for :func:`fastmatch.renormalize`. Copies and pickles keep the note;
    the state dict does not hold it.

    ``biases="normalize"`` and ``"remove"`` correct a merge without data (Qu and Horvath 2024). Between unmatched
    halves, h layers of averaged weights scale the signal of a ReLU network by ``weights[k] ** h``. Averaged biases
    would dominate it.

    Example:
        >>> merged = fm.merge([model_a, model_b], weights=[0.25, 0.75])
        >>> plain = [torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)) for _ in range(2)]
        >>> without_data = fm.merge(plain, biases="normalize")

    Args:
        models: modules or state dicts of one architecture. Of models that are divided among ranks (DTensor, as
            FSDP2 and tensor parallelism make them) all ranks make the call; the result is divided too.
        weights: one per model; None takes equal ones.
        biases: of linear and convolution layers. ``"average"`` treats them like every tensor. ``"normalize"`` makes
            the bias of a layer at depth h ``sum_k weights[k] ** h * b_k``, for networks without norms. The depth is the
            number of layers on the longest path to its output; for state dicts, and modules that ``torch.fx`` cannot
            follow, layers are counted in the order of the state. ``"remove"`` sets biases to zero.

    Returns:
        A new module like the first, or a new state dict; every tensor in its own dtype.

    Raises:
        TypeError: something is neither a module nor a state dict.
        ValueError: architectures differ, weights do not fit (negative ones for ``"normalize"``), a model holds NaN
            or infinity, or the models differ in tensors from which a layer computes its weight, so that an average of these is not
            one of the weights: masks of torch.nn.utils.prune (equal masks are fine), or parametrizations such as weight_norm.

    Warns:
        UserWarning: the weights do not sum to one, so that every tensor is scaled; or ``"normalize"`` for a network with
            norms.
    """
    check_choice("biases", biases, Biases)
    check_models("models", models)
    states = [state_of(m, f"models[{k}]", may_be_divided=True) for k, m in enumerate(models)]
    for k, state in enumerate(states):
        check_finite(state, f"models[{k}]")
    alphas = check_weights(weights, len(models))
    if biases == "normalize" and min(alphas) < 0:
        raise ValueError(f'weights: expected numbers of at least 0 for biases="normalize", got {alphas}')
    warn_of_scale(alphas)
    merged = merge_states(states, alphas)
    if biases == "normalize":
        norms = norms_in(models[0])
        if norms:
            warn_user(
                f'merge: biases="normalize" is for networks without norms, which restore the signal themselves; got {norms}'
            )
        for name, depth in bias_depths(models[0]).items():
            merged |= merge_states([{name: s[name]} for s in states], [a**depth for a in alphas])
    elif biases == "remove":
        merged |= zeroed_biases(merged)
    first = models[0]
    if isinstance(first, Mapping):
        return merged
    return remember_weights(with_state(first, merged), alphas)
