"""Helpers of the LLVM intrinsics: :mod:`simd`, :mod:`register_transpose`, :mod:`nontemporal`, :mod:`half`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending
from numba.np.arrayobj import make_array

__all__ = ["declared", "intrinsic", "vector_at"]

# Any: an intrinsic is called without its first parameter, the typing context, and no type checker knows that.
intrinsic: Any = extending.intrinsic


def declared(builder: Any, name: str, result: Any, parameters: list[Any]) -> Any:
    """Return LLVM's function of that name in the module being built, declared at its first use."""
    kind = ir.FunctionType(result, parameters)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def vector_at(context: Any, builder: Any, array: Any, value: Any, offset: Any, size: int) -> Any:
    """Return a pointer to ``size`` bytes at a flat offset of a contiguous array, as one vector of its elements."""
    vector = ir.VectorType(context.get_data_type(array.dtype), size * 8 // array.dtype.bitwidth)
    start = builder.gep(make_array(array)(context, builder, value).data, [offset])
    return builder.bitcast(start, vector.as_pointer())
