"""Transposes in registers for numba: reorder the columns of a matrix through words of 16 bytes.

A word holds element j of as many rows as fit. :func:`to_words` turns rows into words, and :func:`from_words` turns words,
in any order, into rows. Both transpose two square blocks at a time in registers, since LLVM does not vectorize a loop
that reads along rows and writes along columns. The instructions are LLVM's and portable, as in :mod:`simd`. Bounds are
not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.np.arrayobj import make_array

from fastmatch_kernels._numba.llvm import intrinsic, vector_at

__all__ = ["BYTES", "from_words", "to_words"]

BYTES = 16
"""Size of a word: one instruction interleaves two vectors within 16 bytes on every machine."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def _lanes(array: Any) -> int:
    return BYTES * 8 // array.dtype.bitwidth


def _word(context: Any, builder: Any, words: Any, value: Any, column: Any) -> Any:
    """Return a pointer to a column's word."""
    place = builder.mul(column, ir.Constant(_I64, _lanes(words)))
    return vector_at(context, builder, words, value, place, BYTES)


def _entry(context: Any, builder: Any, array: Any, value: Any, place: Any, offset: int) -> Any:
    """Return ``array[place + offset]`` of a contiguous array of integers, as intp."""
    data = make_array(array)(context, builder, value).data
    number = builder.load(builder.gep(data, [builder.add(place, ir.Constant(_I64, offset))]))
    return context.cast(builder, number, array.dtype, types.intp)


def _order(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


def _transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """Transpose two square blocks, one in the first halves of the vectors and one in the second halves."""
    lanes = len(vectors)
    # log2(lanes) perfect shuffles; each is one unpack instruction per vector.
    low = [block * lanes + k // 2 + (k % 2) * 2 * lanes for block in (0, 1) for k in range(lanes)]
    for _ in range(lanes.bit_length() - 1):
        vectors = [
            builder.shuffle_vector(x, y, _order([k + half for k in low]))
            for x, y in zip(vectors[: lanes // 2], vectors[lanes // 2 :], strict=True)
            for half in (0, lanes // 2)
        ]
    return vectors


def _is_contiguous(array: Any, dimensions: int) -> bool:
    return isinstance(array, types.Array) and array.ndim == dimensions and array.layout == "C"


# The two intrinsics have the same frame but load and store in opposite orders: sharing it would hide what each does.
@intrinsic
def to_words(typing: Any, source: Any, starts: Any, column: Any, words: Any) -> Any:
    """``words[column + j, i] = source.flat[starts[i] + column + j]`` for ``2 * lanes`` columns j."""
    if not (_is_contiguous(source, 2) and _is_contiguous(words, 2) and _is_contiguous(starts, 1)):
        return None
    lanes = _lanes(source)
    align = source.dtype.bitwidth // 8

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = []
        for i in range(lanes):
            start = _entry(context, builder, starts, args[1], ir.Constant(_I64, 0), i)
            offset = builder.add(start, args[2])
            vectors.append(
                builder.load(vector_at(context, builder, source, args[0], offset, 2 * BYTES), align=align)
            )
        for j, vector in enumerate(_transposed(builder, vectors)):
            for half in (0, lanes):
                column = builder.add(args[2], ir.Constant(_I64, j + half))
                word = builder.shuffle_vector(vector, vector, _order(list(range(half, half + lanes))))
                builder.store(word, _word(context, builder, words, args[3], column), align=align)
        return context.get_dummy_value()

    return types.void(source, starts, types.intp, words), code


# The frame of :func:`to_words` again, for the opposite direction.
@intrinsic
def from_words(typing: Any, words: Any, columns: Any, at: Any, target: Any) -> Any:
    """``target[i, at + j] = words[columns[at + j], i]`` for ``2 * lanes`` columns j."""
    if not (_is_contiguous(words, 2) and _is_contiguous(target, 2) and _is_contiguous(columns, 1)):
        return None
    lanes = _lanes(words)
    align = words.dtype.bitwidth // 8

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors = []
        for j in range(lanes):
            pair = []
            for half in (0, lanes):
                column = _entry(context, builder, columns, args[1], args[2], j + half)
                pair.append(builder.load(_word(context, builder, words, args[0], column), align=align))
            vectors.append(builder.shuffle_vector(*pair, _order(list(range(2 * lanes)))))
        width = builder.extract_value(make_array(target)(context, builder, args[3]).shape, 1)
        for i, vector in enumerate(_transposed(builder, vectors)):
            offset = builder.add(builder.mul(ir.Constant(_I64, i), width), args[2])
            builder.store(
                vector, vector_at(context, builder, target, args[3], offset, 2 * BYTES), align=align
            )
        return context.get_dummy_value()

    return types.void(words, columns, types.intp, target), code
