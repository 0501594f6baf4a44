"""Vectors of eight float64 for numba, for loops that LLVM does not vectorize.

LLVM may not reorder a minimum over floats, and numba has no flag that permits it, so such a loop handles one element at a
time. Here a vector is a numba type, and its operations are LLVM's vector instructions. They are portable: a machine
without 512-bit registers uses two or four of its own.

Values are float64; rows may be float32 or float64. Bounds are not checked.

    total = splat(np.inf)
    for j in range(0, m, WIDTH):
        total = minimum(load(row, j), total)
    return reduce_minimum(total)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model
from numba.np.arrayobj import make_array

from fastmatch_kernels._numba.llvm import declared, intrinsic, vector_at

__all__ = [
    "WIDTH",
    "add",
    "ctz",
    "difference",
    "gather",
    "lane",
    "less_equal_mask",
    "less_mask",
    "load",
    "load_part",
    "magnitude",
    "maximum",
    "minimum",
    "popcount",
    "reduce_minimum",
    "replace_at_most",
    "select",
    "splat",
    "store",
    "sum_lanes",
]

WIDTH = 8

_VECTOR = ir.VectorType(ir.DoubleType(), WIDTH)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class _Vector(types.Type):
    """The type of such a vector inside compiled functions; it cannot leave them."""

    def __init__(self) -> None:
        super().__init__(name=f"float64x{WIDTH}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


_vector = _Vector()


def _is_row(array: Any) -> bool:
    return (
        isinstance(array, types.Array)
        and array.ndim == 1
        and array.layout == "C"
        and array.dtype in (types.float32, types.float64)
    )


def _at(context: Any, builder: Any, array: Any, value: Any, index: Any) -> tuple[Any, int]:
    """Pointer to eight elements of a one-dimensional contiguous array, and the alignment of one element."""
    size = array.dtype.bitwidth // 8
    return vector_at(context, builder, array, value, index, WIDTH * size), size


def _widen(builder: Any, value: Any) -> Any:
    return value if value.type == _VECTOR else builder.fpext(value, _VECTOR)


@intrinsic
def load(typing: Any, row: Any, j: Any) -> Any:
    """row[j : j + 8] as float64."""
    if not _is_row(row):
        return None

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _at(context, builder, row, *args)
        return _widen(builder, builder.load(pointer, align=align))

    return _vector(row, types.intp), code


@intrinsic
def load_part(typing: Any, row: Any, j: Any, count: Any, fill: Any) -> Any:
    """row[j : j + count] as float64, and ``fill`` in the other lanes, whose memory is not read; 0 <= count <= 8."""
    if not _is_row(row):
        return None

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _at(context, builder, row, args[0], args[1])
        narrow = pointer.type.pointee
        lanes = ir.Constant(ir.VectorType(_I64, WIDTH), list(range(WIDTH)))
        mask = builder.icmp_signed("<", lanes, _splat(builder, args[2], _I64))
        name = f"llvm.masked.load.v{WIDTH}f{row.dtype.bitwidth}.p0"
        function = declared(builder, name, narrow, [pointer.type, _I32, mask.type, narrow])
        zero = ir.Constant(narrow, None)
        read = builder.call(function, [pointer, ir.Constant(_I32, align), mask, zero])
        return builder.select(mask, _widen(builder, read), _splat(builder, args[3], ir.DoubleType()))

    return _vector(row, types.intp, types.intp, types.float64), code


@intrinsic
def gather(typing: Any, row: Any, items: Any, e: Any) -> Any:
    """row[items[e : e + 8]] for a float64 row and int32 items."""
    if not _is_row(row) or row.dtype != types.float64 or items.dtype != types.int32 or items.layout != "C":
        return None

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _at(context, builder, items, args[1], args[2])
        places = builder.sext(builder.load(pointer, align=align), ir.VectorType(_I64, WIDTH))
        data = make_array(row)(context, builder, args[0]).data
        start = _splat(builder, builder.ptrtoint(data, _I64), _I64)
        size = ir.Constant(places.type, [8] * WIDTH)
        pointers = builder.inttoptr(
            builder.add(start, builder.mul(places, size)), ir.VectorType(data.type, WIDTH)
        )
        mask = ir.Constant(ir.VectorType(ir.IntType(1), WIDTH), [True] * WIDTH)
        name = f"llvm.masked.gather.v{WIDTH}f64.v{WIDTH}p0"
        function = declared(builder, name, _VECTOR, [pointers.type, _I32, mask.type, _VECTOR])
        return builder.call(function, [pointers, ir.Constant(_I32, 8), mask, ir.Constant(_VECTOR, None)])

    return _vector(row, items, types.intp), code


@intrinsic
def store(typing: Any, row: Any, j: Any, x: Any) -> Any:
    """row[j : j + 8] = x for a float64 row."""
    if not _is_row(row) or row.dtype != types.float64:
        return None

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _at(context, builder, row, args[0], args[1])
        builder.store(args[2], pointer, align=align)
        return context.get_dummy_value()

    return types.void(row, types.intp, _vector), code


def _splat(builder: Any, value: Any, element: Any) -> Any:
    vector = ir.Constant(ir.VectorType(element, WIDTH), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """x in every lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], ir.DoubleType())

    return _vector(types.float64), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return _vector(_vector, _vector), code


@intrinsic
def difference(typing: Any, sign: Any, c: Any, v: Any) -> Any:
    """sign * c - v for a sign of 1 or -1. The product is exact, so fusing it with the subtraction changes nothing."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = declared(builder, f"llvm.fmuladd.v{WIDTH}f64", _VECTOR, [_VECTOR] * 3)
        return builder.call(function, [args[0], args[1], builder.fneg(args[2])])

    return _vector(_vector, _vector, _vector), code


@intrinsic
def magnitude(typing: Any, a: Any) -> Any:
    """Elementwise absolute value."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(declared(builder, f"llvm.fabs.v{WIDTH}f64", _VECTOR, [_VECTOR]), list(args))

    return _vector(_vector), code


def _less(builder: Any, a: Any, b: Any) -> Any:
    # As the hardware's minimum instruction: b unless a < b.
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@intrinsic
def minimum(typing: Any, a: Any, b: Any) -> Any:
    """Elementwise minimum; takes b where a is NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _less(builder, *args)

    return _vector(_vector, _vector), code


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """Elementwise maximum; takes b where a is NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = args
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return _vector(_vector, _vector), code


@intrinsic
def replace_at_most(typing: Any, a: Any, limit: Any, b: Any) -> Any:
    """b in the lanes where a <= limit, a in the others."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, limit, b = args
        return builder.select(builder.fcmp_ordered("<=", a, limit), b, a)

    return _vector(_vector, _vector, _vector), code


@intrinsic
def select(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x in the lanes where a < b, y in the others."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, x, y = args
        return builder.select(builder.fcmp_ordered("<", a, b), x, y)

    return _vector(_vector, _vector, _vector, _vector), code


@intrinsic
def lane(typing: Any, a: Any, k: Any) -> Any:
    """The value in lane k."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(*args)

    return types.float64(_vector, types.int64), code


def _across(combine: Callable[[Any, Any, Any], Any], about: str) -> Any:
    @intrinsic
    def folded(typing: Any, a: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            (x,) = args
            half = WIDTH // 2
            while half:
                turned = [(k + half) % WIDTH for k in range(WIDTH)]
                y = builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(_I32, WIDTH), turned))
                x = combine(builder, x, y)
                half //= 2
            return builder.extract_element(x, ir.Constant(_I32, 0))

        return types.float64(_vector), code

    folded.__doc__ = about
    return folded


reduce_minimum = _across(_less, "Minimum of the eight lanes.")
sum_lanes = _across(lambda builder, x, y: builder.fadd(x, y), "Sum of the eight lanes.")


def _comparison(relation: str, about: str) -> Any:
    @intrinsic
    def bits(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            mask = builder.fcmp_ordered(relation, *args)
            return builder.zext(builder.bitcast(mask, ir.IntType(WIDTH)), _I64)

        return types.int64(_vector, _vector), code

    bits.__doc__ = about
    return bits


less_equal_mask = _comparison("<=", "Mask whose bit k is set if a <= b in lane k.")
less_mask = _comparison("<", "Mask whose bit k is set if a < b in lane k.")


@intrinsic
def ctz(typing: Any, bits: Any) -> Any:
    """Index of the lowest set bit; undefined for 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), code


@intrinsic
def popcount(typing: Any, bits: Any) -> Any:
    """Number of set bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), code
