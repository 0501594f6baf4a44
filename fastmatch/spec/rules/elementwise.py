"""Elementwise operations, in place or not, and tensors that are the same at every position."""

from __future__ import annotations

import torch

from fastmatch.spec.labels import unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import POINTWISE, broadcast_labels, rule, set_saved

__all__ = ["FACTORIES", "elementwise", "exchangeable"]

NONLINEARITIES = (
    "_prelu_kernel", "celu", "clamp_min", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "log_sigmoid_forward", "mish", "relu", "sigmoid", "silu", "softplus", "tanh", "threshold",
)  # fmt: skip
"""Activations are read at the input or output of these."""

OTHERS = (
    POINTWISE, "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_neg_view", "_to_copy", "alias", "clone", "complex", "copy", "detach", "fill",
    "fake_quantize_per_tensor_affine_cachemask", "floor_divide", "lift_fresh", "lift_fresh_copy", "polar", "rsub", "zero",
    # Derivatives: networks of forces return those of their energy.
    "_prelu_kernel_backward", "elu_backward", "hardsigmoid_backward", "hardswish_backward", "hardtanh_backward", "leaky_relu_backward",
    "log_sigmoid_backward", "mish_backward", "softplus_backward",
)  # fmt: skip
"""Pointwise operations that torch does not mark as such, and the entry for those that it marks."""

FACTORIES = (
    "empty", "empty_like", "empty_strided", "full", "full_like", "new_empty", "new_empty_strided", "new_full",
    "new_ones", "new_zeros", "ones", "ones_like", "zeros", "zeros_like",
)  # fmt: skip
"""Tensors that are the same at every position, so that axes united with theirs may move."""


@rule(*[name + suffix for name in NONLINEARITIES + OTHERS for suffix in ("", "_")])
def elementwise(record: Record, call: Call) -> None:
    """Unite the operands position by position; a broadcast axis is not united."""
    out, *saved = call.outputs
    result = broadcast_labels(record, call.inputs, out.shape, call.name)
    if not record.knows(out):
        record.set(out, result)
    else:  # in place
        for mine, label in zip(record.labels(out), result, strict=True):
            unify(mine, label, call.name)
    for tensor in saved:  # for a backward pass; empty on some devices
        if tensor.shape == out.shape:
            record.set(tensor, result)
        else:
            set_saved(record, call, [tensor], result)
    first = call.first
    is_nonlinearity = call.base.removesuffix("_") in NONLINEARITIES
    if is_nonlinearity and isinstance(first, torch.Tensor) and first.shape == out.shape:
        record.mark_activation(call, result)


@rule("fake_quantize_per_channel_affine_cachemask")
def _fake_quantized(record: Record, call: Call) -> None:
    """Rounded with a scale for every position along one axis."""
    labels = record.labels(call["self"])
    for name in ("scale", "zero_point"):
        unify(labels[call.dim(len(labels), "axis")], record.labels(call[name])[0], call.name)
    for tensor in call.outputs:
        record.set(tensor, labels)


@rule(*FACTORIES)
def _factory(record: Record, call: Call) -> None:
    record.set(call.out, fresh(call.out.shape))


def exchangeable(record: Record, call: Call) -> None:
    """Take random numbers as alike at every position: where only their distribution counts."""
    if not all(t.is_floating_point() or t.dtype == torch.bool for t in call.outputs):
        raise NotImplementedError("random positions")
    shaped = [t for t in call.inputs if t.shape == call.outputs[0].shape]
    if len(shaped) != len(call.inputs) or any(t.shape != call.outputs[0].shape for t in call.outputs):
        raise NotImplementedError("a distribution with parameters of another shape")
    labels = broadcast_labels(record, shaped, call.outputs[0].shape, call.name)
    for tensor in call.outputs:
        if not record.knows(tensor):
            record.set(tensor, labels)
