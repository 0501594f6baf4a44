"""Models run in double precision, to compare functions: copies, inputs, outputs and their largest difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastmatch._internal.modules import copy_module, to_eval_mode
from fastmatch._internal.randomness import random_numbers_kept
from fastmatch._internal.sequences import sequence_like
from fastmatch.spec.running import buffers_kept, copies_of, outputs_named, plain_operations

__all__ = ["Wide", "double_copy", "in_double", "largest_difference", "outputs_of"]

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class Wide(TorchFunctionMode):
    """Turn a model's own casts to float32, common in norms and rotary tables, into casts to float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return WIDER.get(value, value) if isinstance(value, torch.dtype) else value

        if not any(isinstance(x, torch.Tensor) for x in args):
            return func(*args, **(kwargs or {}))  # a new tensor, such as one to read a file into
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


def double_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode with every parameter and buffer in float64 or complex128."""
    copied = to_eval_mode(copy_module(model))
    for tensor in [*copied.parameters(), *copied.buffers()]:
        tensor.data = in_double(tensor.data)
    return copied


def in_double(value: Any) -> Any:
    """Return nested tensors with the floating point ones in float64 and the complex ones in complex128."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: in_double(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return sequence_like(value, map(in_double, value))
    return value


def outputs_of(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    names: Sequence[str] | None = None,
    *,
    wide: bool = True,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return every output in float64, integers and booleans included; the random numbers in it come from ``seed``.

    Neither the inputs nor the model's buffers change, even if the model writes to them.

    With ``wide``, the model's casts to float32 become casts to float64.
    """
    args, kwargs = copies_of(args), copies_of(kwargs)
    with (
        torch.inference_mode(False), torch.no_grad(), random_numbers_kept(seed), plain_operations(model, "eager"),
        buffers_kept(model),
    ):  # fmt: skip
        with Wide() if wide else nullcontext():
            returned = model(*args, **kwargs)
        outputs = [t.detach().resolve_conj() for t in outputs_named(returned, names)]
        return [
            (torch.view_as_real(t) if t.is_complex() else t).to(torch.float64, copy=True) for t in outputs
        ]


def largest_difference(expected: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    """Return the largest difference relative to the largest expected output; infinity if shapes or NaN differ."""
    differences = (
        absolute_difference(old, new) / largest(old) for old, new in zip(expected, outputs, strict=True)
    )
    return max(differences, default=0.0)


def largest(tensor: torch.Tensor) -> float:
    """Return the largest finite absolute value, at least the smallest number that can be divided by."""
    finite = tensor[torch.isfinite(tensor)]
    return max(float(finite.abs().max()), 1e-300) if finite.numel() else 1e-300


def absolute_difference(old: torch.Tensor, new: torch.Tensor) -> float:
    """Return the largest difference of finite values; infinity if shapes or other values differ."""
    finite = torch.isfinite(old)
    # NaN would compare as no error, so values that are not finite must be the same; the others are measured.
    if old.shape != new.shape or not torch.equal(finite, torch.isfinite(new)):
        return float("inf")
    if not torch.equal(old[~finite].nan_to_num(), new[~finite].nan_to_num()):
        return float("inf")
    return float((old - new)[finite].abs().max()) if finite.any() else 0.0
