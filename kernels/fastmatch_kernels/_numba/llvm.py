"""Helpers of the LLVM intrinsics: :mod:`simd`, :mod:`register_transpose`, :mod:`nontemporal`, :mod:`half`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.np.arrayobj import make_array, populate_array

__all__ = ["borrowed", "declared", "flat", "intrinsic", "vector_at"]

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


@intrinsic
def borrowed(typing: Any, arrays: Any) -> Any:
    """Return an array, or a tuple of arrays, without its owner.

    Each view of an array with an owner counts a reference, which takes as long as a short run of elements. The caller of a
    kernel keeps its arrays alive, so the kernel need not count.
    """
    is_tuple = isinstance(arrays, types.BaseTuple)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = []
        values = cgutils.unpack_tuple(builder, args[0]) if is_tuple else args
        for kind, value in zip(arrays if is_tuple else [arrays], values, strict=True):
            array = make_array(kind)(context, builder, value)
            array.meminfo = ir.Constant(array.meminfo.type, None)
            array.parent = ir.Constant(array.parent.type, None)
            found.append(array._getvalue())
        return context.make_tuple(builder, arrays, found) if is_tuple else found[0]

    return arrays(arrays), code


@intrinsic
def flat(typing: Any, array: Any) -> Any:
    """Return a contiguous array as one run of elements, without its owner, as :func:`borrowed`.

    numba's ``reshape`` would compile the text of its error message with the kernel, which takes two seconds.
    """
    if array.layout != "C":
        return None
    run = types.Array(array.dtype, 1, "C")

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, made = make_array(array)(context, builder, args[0]), make_array(run)(context, builder)
        size = ir.Constant(given.nitems.type, array.dtype.bitwidth // 8)
        populate_array(
            made,
            data=given.data,
            shape=[given.nitems],
            strides=[size],
            itemsize=size,
            meminfo=None,
            parent=None,
        )
        return made._getvalue()

    return run(array), code
