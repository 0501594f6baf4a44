"""Conversions of bfloat16 and float16 for numba, which has neither type: bits in uint16 to float32 and back.

LLVM vectorizes loops over them. Decoding is exact. Encoding rounds to nearest, ties to even. NaN stays NaN.
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
"""Values of ``half`` below. It is None for the types that numba has, and numba prunes the branches on None."""


def _converts_float16() -> bool:
    """Return whether the target processor converts float16; otherwise LLVM would call a library."""
    context: Any = cpu_target.target_context  # a property that no checker sees through
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or triple.startswith(("aarch64", "arm64"))


HARDWARE = _converts_float16()
"""Whether float16 is converted by one instruction."""


@intrinsic
def _view(typing: Any, bits: Any, like: Any) -> Any:
    """Reinterpret the low bits of an unsigned integer as the type of ``like``, float32 or float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = types.Integer.from_bitwidth(like.bitwidth, signed=False)
        low = context.cast(builder, args[0], bits, word)
        return builder.bitcast(low, context.get_value_type(like))

    return like(bits, like), code


@intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """Return the bits of a float32 or float64 in an unsigned integer of its width."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(value.bitwidth))

    return (types.uint32 if value == types.float32 else types.uint64)(value), code


@intrinsic
def _extend(typing: Any, bits: Any) -> Any:
    """Convert float16 bits to float32 in one instruction."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), code


@intrinsic
def _truncate(typing: Any, value: Any) -> Any:
    """Convert a float32 to float16 bits in one instruction."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), code


@njit(nogil=True)
def decode(bits, half, like):
    """Return the number in the low bits of an unsigned integer: float32, or of ``like``'s type if ``half`` is None."""
    if half is None:
        return _view(bits, like)
    if half == BFLOAT16:
        return np.uint32(np.uint32(bits) << 16).view(np.float32)
    if HARDWARE:
        return _extend(np.uint16(bits))
    return _decode_float16(bits)


@njit(nogil=True)
def encode(value, half):
    """Return the bits of a float32 rounded to ``half``, or of the number itself if ``half`` is None."""
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
    # No multiplication: a subnormal float32 result costs a hundred cycles.
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # Below 2^-14 adding 0.5 brings the last place to 2^-24, float16's own, with the hardware's rounding.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32)
    rounded = np.uint32(shifted - np.uint32(0x3F000000)) if magnitude < np.uint32(0x38800000) else rounded
    rounded = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else rounded  # 65520 and inf
    rounded = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else rounded  # NaN
    return np.uint16(rounded | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))
