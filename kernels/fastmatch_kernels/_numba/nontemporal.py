"""Non-temporal stores for numba: a large result leaves the caches before it is read, so it need not enter them.

An ordinary store first reads the line that it writes to, so a copy moves three times its bytes instead of twice. LLVM
emits non-temporal stores only on request and does not vectorize loops that have them. These intrinsics are therefore its
vector instructions, 32 bytes at a time. Bounds are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.np.arrayobj import make_array

from fastmatch_kernels._numba.half import BFLOAT16, FLOAT16
from fastmatch_kernels._numba.llvm import declared, intrinsic, vector_at

__all__ = ["BYTES", "copy", "fence", "mean", "misaligned", "prefetch"]

BYTES = 32
"""Size and alignment of one store."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def misaligned(typing: Any, run: Any) -> Any:
    """Number of elements of a contiguous run before the first aligned one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.ptrtoint(make_array(run)(context, builder, args[0]).data, _I64)
        before = builder.and_(builder.neg(address), ir.Constant(_I64, BYTES - 1))
        return builder.udiv(before, ir.Constant(_I64, run.dtype.bitwidth // 8))

    return types.intp(run), code


@intrinsic
def fence(typing: Any) -> Any:
    """Make earlier stores visible to whatever runs later."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def prefetch(typing: Any, x: Any, j: Any) -> Any:
    """Prefetch x[j], which may be beyond the end of x: it does not wait and does not fault."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(make_array(x)(context, builder, args[0]).data, [args[1]])
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        function = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [place.type, _I32, _I32, _I32])
        # To read, into every cache, data.
        builder.call(function, [place, *(ir.Constant(_I32, k) for k in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(x, types.intp), code


def _read(context: Any, builder: Any, array: Any, value: Any, j: Any) -> Any:
    return builder.load(vector_at(context, builder, array, value, j, BYTES), align=array.dtype.bitwidth // 8)


def _write(context: Any, builder: Any, array: Any, value: Any, j: Any, vector: Any) -> Any:
    store = builder.store(vector, vector_at(context, builder, array, value, j, BYTES), align=BYTES)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
    return context.get_dummy_value()


@intrinsic
def copy(typing: Any, x: Any, run: Any, j: Any) -> Any:
    """``run[j : j + 32 bytes] = x[j : ...]``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _write(context, builder, run, args[1], args[2], _read(context, builder, x, args[0], args[2]))

    return types.void(x, run, types.intp), code


def _splat(value: int, like: Any) -> Any:
    return ir.Constant(like, [value] * like.count)


def _decode(builder: Any, bits: Any, half: int | None, number: Any) -> list[Any]:
    """Decode a vector of integers to numbers of the element type ``number``.

    bfloat16 gives two vectors, of the even and of the odd elements. A bfloat16 is the upper half of a float32, so two
    neighbours are separated by a shift and a mask; widening them in order would move them across lanes.
    """
    wide = ir.VectorType(number, bits.type.count)
    if half is None:
        return [builder.bitcast(bits, wide)]
    if half == FLOAT16:
        return [builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), bits.type.count)), wide)]
    pairs = builder.bitcast(bits, ir.VectorType(_I32, bits.type.count // 2))
    numbers = ir.VectorType(number, pairs.type.count)
    even = builder.shl(pairs, _splat(16, pairs.type))
    odd = builder.and_(pairs, _splat(0xFFFF0000, pairs.type))
    return [builder.bitcast(part, numbers) for part in (even, odd)]


def _encode(builder: Any, values: list[Any], half: int | None, like: Any) -> Any:
    """Encode what :func:`_decode` returns, as :func:`fastmatch_kernels._numba.half.encode` does: to nearest, ties to even.

    bfloat16 NaN is not handled separately. A NaN that arithmetic makes, or passes on from bfloat16, has a zero lower
    half, and rounding changes only that half. A factor that is NaN must have a zero lower half too.
    """
    if half is None:
        return builder.bitcast(values[0], like)
    if half == FLOAT16:
        return builder.bitcast(builder.fptrunc(values[0], ir.VectorType(ir.HalfType(), like.count)), like)
    rounded = []
    for value in values:
        bits = builder.bitcast(value, ir.VectorType(_I32, value.type.count))
        last = builder.and_(builder.lshr(bits, _splat(16, bits.type)), _splat(1, bits.type))
        rounded.append(builder.add(builder.add(bits, _splat(0x7FFF, bits.type)), last))
    even = builder.bitcast(builder.lshr(rounded[0], _splat(16, rounded[0].type)), like)
    odd = builder.bitcast(rounded[1], like)
    # Upper halves; those of odd elements are in place already on a little-endian machine, which numba requires.
    places = [k + (k % 2) * like.count for k in range(like.count)]
    return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_I32, like.count), places))


def _mean_of(half: int | None) -> Callable[..., Any]:
    @intrinsic
    def combined(typing: Any, x: Any, y: Any, alpha: Any, beta: Any, run: Any, j: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number = context.get_value_type(alpha)
            xs, ys = (
                _decode(builder, _read(context, builder, array, value, args[5]), half, number)
                for array, value in ((x, args[0]), (y, args[1]))
            )
            wide = xs[0].type
            factors = []
            for value in args[2:4]:
                first = builder.insert_element(ir.Constant(wide, ir.Undefined), value, ir.Constant(_I32, 0))
                order = _splat(0, ir.VectorType(_I32, wide.count))
                factors.append(builder.shuffle_vector(first, first, order))
            name = f"llvm.fmuladd.v{wide.count}f{alpha.bitwidth}"
            function = declared(builder, name, wide, [wide] * 3)
            totals = [
                builder.call(function, [factors[0], x_part, builder.fmul(factors[1], y_part)])
                for x_part, y_part in zip(xs, ys, strict=True)
            ]
            like = ir.VectorType(context.get_data_type(run.dtype), BYTES * 8 // run.dtype.bitwidth)
            return _write(context, builder, run, args[4], args[5], _encode(builder, totals, half, like))

        return types.void(x, y, alpha, beta, run, types.intp), code

    return combined


_mean, _mean_bfloat16, _mean_float16 = _mean_of(None), _mean_of(BFLOAT16), _mean_of(FLOAT16)


def mean(x: Any, y: Any, half: Any, alpha: Any, beta: Any, run: Any, j: Any) -> None:
    """``run[j : j + 32 bytes] = alpha x[j : ...] + beta y[j : ...]`` of the numbers that the bits stand for; in compiled code only."""
    raise NotImplementedError("for compiled functions")


@extending.overload(mean)
def _compiled_mean(x, y, half, alpha, beta, run, j):
    # Select by type: numba compiles both sides of a branch on a value.
    if isinstance(half, types.NoneType):

        def code(x, y, half, alpha, beta, run, j):
            _mean(x, y, alpha, beta, run, j)

    else:

        def code(x, y, half, alpha, beta, run, j):
            if half == BFLOAT16:
                _mean_bfloat16(x, y, alpha, beta, run, j)
            else:
                _mean_float16(x, y, alpha, beta, run, j)

    return code
