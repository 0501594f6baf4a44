"""bfloat16 and float16 inside compiled loops, which know neither type: bits as uint16 to float32 and back.

Written so that LLVM turns a loop over them into vector instructions. Every number keeps its value; float32 is
rounded to nearest, ties to even; NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.llvm import intrinsic

__all__ = ["BFLOAT16", "FLOAT16", "HALF", "HARDWARE", "decode", "encode"]

BFLOAT16, FLOAT16 = 1, 2
HALF = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
"""What ``half`` is below. For the types that numba knows it is None, and numba compiles no branch on it."""


def _converts_float16() -> bool:
    """Whether the processor that code is compiled for converts float16 itself; LLVM would else call a library."""
    context: Any = cpu_target.target_context  # a property that no checker sees through
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or triple.startswith(("aarch64", "arm64"))


HARDWARE = _converts_float16()
"""Whether float16 is converted by one instruction."""


@intrinsic
def _view(typing: Any, bits: Any, like: Any) -> Any:
    """The low bits of an unsigned integer as a number of the type of ``like``, float32 or float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = types.Integer.from_bitwidth(like.bitwidth, signed=False)
        low = context.cast(builder, args[0], bits, word)
        return builder.bitcast(low, context.get_value_type(like))

    return like(bits, like), code


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 or float64 in an unsigned integer of its width."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(value.bitwidth))

    return (types.uint32 if value == types.float32 else types.uint64)(value), code


@intrinsic
def _extend(typing: Any, bits: Any) -> Any:
    """float32 of float16 bits, one instruction."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _truncate(typing: Any, value: Any) -> Any:
    """float16 bits of a float32, one instruction."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), code


@njit(nogil=True)
def decode(bits, half, like):
    """The number that the low bits of an unsigned integer stand for: float32, or of ``like``'s type for None."""
    if half is None:
        return _view(bits, like)
    if half == BFLOAT16:
        return np.uint32(np.uint32(bits) << 16).view(np.float32)
    if HARDWARE:
        return _extend(np.uint16(bits))
    return _decode_float16(bits)


@njit(nogil=True)
def encode(value, half):
    """The bits of a number in an unsigned integer: of a float32 rounded to ``half``, or as it is for None."""
    if half is None:
        return _bits(value)
    if half == BFLOAT16:
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
        return np.uint16(0x7FC0) if np.isnan(value) else rounded
    if HARDWARE:
        return _truncate(np.float32(value))
    return _encode_float16(value)


@njit(nogil=True)
def _decode_float16(bits):
    # 2^112 moves float16's exponent bias to float32's, subnormal numbers included.
    value = np.float32(np.uint32((np.uint32(bits) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112))
    magnitude = np.uint32(np.float32(value).view(np.uint32))
    if bits & 0x7C00 == 0x7C00:  # inf and NaN
        magnitude = np.uint32(0x7F800000 | ((np.uint32(bits) & 0x3FF) << 13))
    return np.uint32(magnitude | ((np.uint32(bits) & 0x8000) << 16)).view(np.float32)


@njit(nogil=True)
def _encode_float16(value):
    bits = np.float32(value).view(np.uint32)
    # No product: one that falls below float32's normal numbers costs a hundred cycles.
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Below 2^-14 adding 0.5 brings the last place to 2^-24, float16's own, with the hardware's rounding.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
    rounded = np.uint32(shifted - np.uint32(0x3F000000)) if magnitude < np.uint32(0x38800000) else rounded
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded  # 65520 and inf
    rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else rounded  # NaN
    return np.uint16(rounded | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))
