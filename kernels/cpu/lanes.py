"""Blocks of a matrix transposed in registers, for numba: 16 bytes of as many rows as they hold elements.

LLVM does not find vectors in a loop that reads along rows and writes along columns. Like :mod:`simd`, these are its
own vector instructions, so a machine with other registers gets what it has. Nothing is checked: positions must be
in range.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.np.arrayobj import make_array

__all__ = ["BYTES", "transpose"]

BYTES = 16
"""Of a vector: what one instruction moves on every machine."""

# Called without its first parameter, the typing context: no checker can know.
intrinsic: Any = extending.intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _pointer(context: Any, builder: Any, array: Any, value: Any, offset: Any) -> Any:
    """Pointer to 16 bytes at a flat offset of a contiguous array, as a vector of its elements."""
    element = context.get_data_type(array.dtype)
    vector = ir.VectorType(element, BYTES // (array.dtype.bitwidth // 8))
    start = builder.gep(make_array(array)(context, builder, value).data, [offset])
    return builder.bitcast(start, vector.as_pointer())


def _is_matrix(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 2 and array.layout == "C"


@intrinsic
def transpose(
    typing: Any, source: Any, rows: Any, first: Any, column: Any, target: Any, row: Any, at: Any
) -> Any:
    """A square block, transposed: as many rows as 16 bytes hold elements, and 16 bytes of each.

    ``target[row + j, at + i] = source[rows[first + i], column + j]``: contiguous matrices of one unsigned type.
    """
    if not (_is_matrix(source) and _is_matrix(target) and source.dtype == target.dtype):
        return None
    if not (isinstance(rows, types.Array) and rows.ndim == 1 and rows.layout == "C"):
        return None
    size = source.dtype.bitwidth // 8
    lanes = BYTES // size

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = (make_array(t)(context, builder, args[k]).shape for t, k in ((source, 0), (target, 4)))
        source_width, target_width = (builder.extract_value(shape, 1) for shape in wide)
        numbers = make_array(rows)(context, builder, args[1]).data
        vectors = []
        for i in range(lanes):
            place = builder.add(args[2], ir.Constant(_I64, i))
            number = context.cast(
                builder, builder.load(builder.gep(numbers, [place])), rows.dtype, types.intp
            )
            offset = builder.add(builder.mul(number, source_width), args[3])
            vectors.append(builder.load(_pointer(context, builder, source, args[0], offset), align=size))
        # log2(lanes) perfect shuffles of the whole block; each is one unpack instruction a vector.
        low = [k // 2 + (k % 2) * lanes for k in range(lanes)]
        for _ in range(lanes.bit_length() - 1):
            shuffled = []
            for x, y in zip(vectors[: lanes // 2], vectors[lanes // 2 :], strict=True):
                for half in (0, lanes // 2):
                    mask = ir.Constant(ir.VectorType(_I32, lanes), [k + half for k in low])
                    shuffled.append(builder.shuffle_vector(x, y, mask))
            vectors = shuffled
        for j, vector in enumerate(vectors):
            place = builder.add(args[5], ir.Constant(_I64, j))
            offset = builder.add(builder.mul(place, target_width), args[6])
            builder.store(vector, _pointer(context, builder, target, args[4], offset), align=size)
        return context.get_dummy_value()

    return types.void(source, rows, types.intp, types.intp, target, types.intp, types.intp), code
