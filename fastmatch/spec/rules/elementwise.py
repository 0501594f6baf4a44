"""Elementwise operations, in place or not, and tensors that are the same at every position."""

from __future__ import annotations

import torch

from fastmatch.spec.labels import Label, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule

__all__ = ["FACTORIES", "elementwise"]

NONLINEARITIES = (
    "_prelu_kernel", "celu", "clamp_min", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "log_sigmoid_forward", "mish", "prelu", "relu", "sigmoid", "silu", "softplus", "tanh", "threshold",
)  # fmt: skip
"""Activations are read at the input or output of these."""

OTHERS = (
    "_to_copy", "abs", "acos", "add", "addcdiv", "addcmul", "alias", "asin", "atan", "atan2", "bitwise_and",
    "bitwise_not", "bitwise_or", "ceil", "clamp", "clamp_max", "clone", "contiguous", "copy", "cos", "cosh", "detach",
    "div", "eq", "erf", "exp", "exp2", "expm1", "fill", "floor", "floor_divide", "fmod", "ge", "gt", "hardshrink",
    "isfinite", "isinf", "isnan", "le", "lerp", "lift_fresh", "log", "log1p", "log2", "logical_and", "logical_not",
    "logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "nan_to_num", "ne", "neg", "pow", "reciprocal",
    "relu6", "remainder", "round", "rsqrt", "rsub", "sign", "sin", "sinh", "softshrink", "sqrt", "square", "sub",
    "tan", "to", "trunc", "where", "zero",
)  # fmt: skip

FACTORIES = (
    "empty", "empty_like", "empty_strided", "full", "full_like", "new_empty", "new_empty_strided", "new_full",
    "new_ones", "new_zeros", "ones", "ones_like", "zeros", "zeros_like",
)  # fmt: skip
"""Tensors that are the same at every position, so that axes united with theirs may move."""


@rule(*[name + suffix for name in NONLINEARITIES + OTHERS for suffix in ("", "_")])
def elementwise(record: Record, call: Call) -> None:
    """Unite the operands position by position; a broadcast axis is not united."""
    out, *saved = call.outputs
    labels: list[Label | None] = [None] * out.ndim
    for tensor in call.inputs:
        offset = out.ndim - tensor.ndim
        for dim, label in enumerate(record.labels(tensor)):
            if label.size != out.shape[offset + dim]:
                continue  # broadcast: the same at every position of this axis
            seen = labels[offset + dim]
            if seen is not None:
                unify(seen, label, call.name)
            if seen is None or label.follows is not None:
                labels[offset + dim] = label
    result = [label if label is not None else Label(n) for label, n in zip(labels, out.shape, strict=True)]
    if not record.knows(out):
        record.set(out, result)
    else:  # in place
        for mine, label in zip(record.labels(out), result, strict=True):
            unify(mine, label, call.name)
    for tensor in saved:  # for a backward pass; empty on some devices
        record.set(tensor, result if tensor.shape == out.shape else fresh(tensor.shape, call.name))
    first = call.first
    is_nonlinearity = call.base.removesuffix("_") in NONLINEARITIES
    if is_nonlinearity and isinstance(first, torch.Tensor) and first.shape == out.shape:
        record.mark_activation(call, result)


@rule(*FACTORIES)
def _factory(record: Record, call: Call) -> None:
    record.set(call.out, fresh(call.out.shape))
