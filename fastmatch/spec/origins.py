"""What the values of a tensor come from: inputs, weights, operations that make many of them equal."""

from __future__ import annotations

from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record

__all__ = ["COPIES", "follow_origins", "follow_ties"]

COPIES = frozenset(
    [
        "_to_copy",
        "_unsafe_view",
        "clone",
        "contiguous",
        "copy",
        "lift_fresh",
        "cat",
        "repeat",
        "_reshape_copy",
    ]
)
"""Operations that hand values on as a view does: what reads their results reads their operands."""

LEVELING = frozenset(
    [
        "_adaptive_avg_pool2d", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clamp", "clamp_max",
        "clamp_min", "eq", "fake_quantize_per_channel_affine_cachemask", "fake_quantize_per_tensor_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "floor", "floor_divide", "fmax", "fmin", "ge", "gt", "hardshrink", "hardsigmoid", "hardswish",
        "hardtanh", "heaviside", "isfinite", "isinf", "isnan", "le", "logical_and", "logical_not", "logical_or",
        "logical_xor", "lt", "maximum", "minimum", "ne", "relu", "relu6", "round", "sgn", "sign", "signbit",
        "softshrink", "threshold", "trunc",
    ]
)  # fmt: skip
"""Operations whose results are equal wherever their operand is above, below or between some values."""

SUMS = frozenset(["add", "rsub", "sub"])
"""Operations whose results differ at two positions if one operand does, whatever the other is."""


OUTER = frozenset(["add", "div", "expand", "mul", "rsub", "repeat", "sub"])
"""Operations that may hand one value to many positions, if no operand has the shape of the result."""


def follow_origins(record: Record, call: Call) -> None:
    """Note which results depend on the model's inputs, and which on its weights."""
    if any(record.is_data(t) for t in call.inputs):
        for tensor in call.outputs:
            record.mark_data(tensor)
    if any(record.is_state(t) for t in call.inputs):
        for tensor in call.outputs:
            record.mark_state(tensor)
    if any(record.is_learned(t) for t in call.inputs):
        for tensor in call.outputs:
            record.mark_learned(tensor)


def follow_ties(record: Record, call: Call) -> None:
    """Note which results may hold equal values at many positions, so that sorting them depends on their order."""
    base = call.base.removesuffix("_")
    operands = [t for t in call.inputs if t.numel() > 1]
    level = any(record.is_level(t) for t in operands)
    if base in SUMS:  # a product does not differ: zeros stay zeros
        level &= not any(t.shape == call.out.shape and not record.is_level(t) for t in operands)
    to_integers = call.base == "_to_copy" and any(
        t.is_floating_point() and not call.out.is_floating_point() for t in call.inputs
    )
    # Of an outer product, a single zero of one operand makes a whole row of zeros.
    spread_out = bool(operands) and base in OUTER and all(t.shape != call.out.shape for t in operands)
    if base in LEVELING or to_integers or level or spread_out:
        for tensor in call.outputs:
            record.mark_level(tensor)
