"""Prove that permuting a network by a spec does not change its function."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import state_of
from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import Permutations, PermutationSpec
from fastmatch.spec.running import arguments_of, outputs_named, plain_operations

__all__ = ["Verification", "Wide", "in_double", "largest_difference", "outputs_of", "verify"]


class Wide(TorchFunctionMode):
    """Turn a model's own casts to float32, common in norms and rotary tables, into casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if not any(isinstance(x, torch.Tensor) for x in args):
            return func(*args, **(kwargs or {}))  # a new tensor, such as one to read a file into
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`.

    Attributes:
        error: the largest difference of the outputs, relative to the largest output.
        groups: the groups that moved.
    """

    error: float
    groups: tuple[str, ...]


def verify(
    model: nn.Module,
    spec: PermutationSpec,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> Verification:
    """Permute every group of a model at random and compare the outputs, in float64.

    Example:
        >>> spec = fm.PermutationSpec.trace(model_a, x)
        >>> fm.verify(model_a, spec, x).error < 1e-10
        True

    Args:
        model: the model, which is not changed; a float64 copy is run twice in eval mode.
        spec: which axes move together.
        example_inputs: a tensor or a tuple of positional inputs.
        kwargs: keyword inputs.
        outputs: which outputs to compare, as for :meth:`PermutationSpec.trace`; all of them for None.
        seed: of the random permutations.
        tolerance: the largest difference allowed, relative to the largest output.

    Returns:
        A :class:`Verification`.

    Raises:
        ValueError: the outputs differ (the groups that change them by themselves are named), the model does not
            run in float64, or it returns nothing that can be compared.
    """
    args, keywords = arguments_of(example_inputs, kwargs)
    args, keywords = in_double(args), in_double(keywords)
    generator = torch.Generator().manual_seed(seed)
    try:
        double = copy.deepcopy(model).double().eval()
        expected = outputs_of(double, args, keywords, outputs)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"model: no memory for a run of its float64 copy ({error}); verify a copy on the CPU, or pass verify=False "
            "to go on without the proof"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"model: does not run in float64 on the example inputs ({error}); "
            "pass verify=False to go on without the proof"
        ) from error
    if not any(torch.isfinite(t).any() for t in expected):
        raise ValueError(
            "example_inputs: the model returns no finite number on them, so there is nothing to compare; "
            "give other inputs, or pass verify=False to go on without the proof"
        )
    permutations = spec.random(generator)
    error = _error(double, spec, permutations, args, keywords, expected, outputs)
    if not error <= tolerance:
        guilty = {
            name: alone
            for name, perm in permutations.items()
            if not (alone := _error(double, spec, {name: perm}, args, keywords, expected, outputs))
            <= tolerance
        }
        named = (
            ", ".join(f"{n!r} (relative error {e:.2g})" for n, e in guilty.items())
            or "several of them together"
        )
        raise ValueError(
            f"spec: permuting changes the network's function; group {named}. The outputs differ by {error:.2g} "
            f"relative to the largest; at most {tolerance:.2g} is allowed"
        )
    return Verification(error, tuple(spec.groups))


def in_double(value: Any) -> Any:
    """Return nested tensors with the floating point ones in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: in_double(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_double(v) for v in value)
    return value


def outputs_of(
    model: nn.Module, args: Any, kwargs: Any, names: Sequence[str] | None = None
) -> list[torch.Tensor]:
    """Return every output in float64, integers and booleans included; the model's casts to float32 are widened."""
    with torch.no_grad(), Wide(), plain_operations(model, "eager"):
        outputs = [t.detach() for t in outputs_named(model(*args, **kwargs), names)]
    return [(torch.view_as_real(t) if t.is_complex() else t).to(torch.float64, copy=True) for t in outputs]


def _error(
    model: nn.Module,
    spec: PermutationSpec,
    permutations: Permutations,
    args: Any,
    kwargs: Any,
    expected: list[torch.Tensor],
    outputs: Sequence[str] | None,
) -> float:
    """The largest difference between the expected outputs and those of the permuted model."""
    moved = with_state(model, apply_permutations(state_of(model, "model"), spec, permutations))
    return largest_difference(expected, outputs_of(moved, args, kwargs, outputs))


def largest_difference(expected: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest expected output; infinity if shapes or NaN differ."""
    worst = 0.0
    for old, new in zip(expected, outputs, strict=True):
        # NaN would compare as no error, so values that are not finite must be the same; the others are measured.
        finite = torch.isfinite(old)
        if old.shape != new.shape or not torch.equal(old[~finite].nan_to_num(), new[~finite].nan_to_num()):
            return float("inf")
        if not torch.equal(finite, torch.isfinite(new)):
            return float("inf")
        if finite.any():
            scale = max(float(old[finite].abs().max()), 1e-30)
            worst = max(worst, float((old - new)[finite].abs().max()) / scale)
    return worst
