"""Random assignment problems of every kind, each made again from a seed and a number."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bench.lib.families import FAMILIES, Family
from fastmatch.assignment import DenseShortlists, SmallDense, solve

Generator = np.random.Generator
Way = Literal["solve", "linear_sum_assignment", "solve_batched"]

SOLVERS = (DenseShortlists, SmallDense)
"""Solvers of a matrix that a problem may ask for by name."""

SIZES = ((0.55, 12), (0.30, 60), (0.12, 200), (0.025, 500), (0.005, 1500))
"""Share of the problems and their largest side."""

DTYPES = {
    "float64": 0.45, "float32": 0.25, "int32": 0.08, "int64": 0.07, "float16": 0.06, "bool": 0.04, "uint8": 0.03,
    "int16": 0.02,
}  # fmt: skip

INTEGERS = ("int32", "int64", "uint8", "int16", "bool")


@dataclass(frozen=True)
class Problem:
    """A matrix as a user would hand it over, and one whose optimal assignments are the same.

    Args:
        told: what it is, in words.
        cost: what is solved, of any number type and layout.
        maximize: the sense.
        base: float64, to be minimized. Its optimal assignments are optimal for ``cost``.
        way: the function that is called.
        warm: how a warm start is made of the cost; None for a cold start.
        solver: one of :data:`SOLVERS`, or None for the choice of the library.
        scale: the size of the numbers whose rounding nobody avoids. 0 where only the matched entries' sizes count.
        may_refuse: words, one of which an error may contain that refuses the problem by name.
    """

    told: str
    cost: Any
    maximize: bool
    base: np.ndarray
    way: Way = "solve"
    warm: str | None = None
    solver: type | None = None
    scale: float = 0.0
    may_refuse: tuple[str, ...] = ()


def size(g: Generator) -> int:
    largest = g.choice([top for _, top in SIZES], p=[share for share, _ in SIZES])
    return int(g.integers(1, largest + 1))


def shape(g: Generator) -> tuple[int, int]:
    n = size(g)
    draw = g.random()
    if draw < 0.5:
        return n, n
    m = n + int(g.integers(1, 3)) if draw < 0.7 else int(n * g.uniform(1, 4)) + 1
    return (n, m) if g.random() < 0.5 else (m, n)


def matrix_problem(g: Generator, largest: int | None = None) -> Problem:
    """Return the problem that a generator draws; ``largest`` bounds its sides."""
    n, m = shape(g)
    if largest is not None:
        n, m = min(n, largest), min(m, largest)
    family = FAMILIES[list(FAMILIES)[g.integers(len(FAMILIES))]]
    dtype = str(g.choice(list(DTYPES), p=list(DTYPES.values())))
    made = _integers if dtype in INTEGERS and "int32" in family.dtypes else _floats
    if made is _floats and dtype in INTEGERS:
        dtype = "float64"
    found = made(g, family, (n, m), dtype)
    found = replace(found, told=f"{family.name}, {n} x {m}, {found.cost.dtype}{found.told}")
    return _dressed(g, found)


def _integers(g: Generator, family: Family, sides: tuple[int, int], dtype: str) -> Problem:
    base = family(*sides, int(g.integers(2**31)), "int32").astype(np.int64)
    told, may_refuse = "", ()
    if dtype == "bool":
        base = (base > np.median(base)).astype(np.int64)
    elif dtype in ("uint8", "int16"):
        bounds = np.iinfo(dtype)
        base = base.clip(bounds.min, bounds.max)
    cost = base.astype(dtype)
    if dtype == "int64" and g.random() < 0.5:
        room = 62 - int(np.abs(base).max(initial=1)).bit_length()
        shift = int(g.integers(0, max(room, 1)))
        offset = int(g.choice([0, 2**40, 2**50, 2**52, 2**53, 2**61])) * int(g.choice([-1, 1]))
        cost = (base << shift) + offset
        told = f" times 2^{shift} plus {offset}"
        may_refuse = ("2^53",) if max(int(cost.max()), -int(cost.min())) > 2**53 else ()
    return Problem(told, cost, False, base.astype(np.float64), may_refuse=may_refuse)


def _floats(g: Generator, family: Family, sides: tuple[int, int], dtype: str) -> Problem:
    stored = "float64" if dtype == "float16" or dtype not in family.dtypes else dtype
    base = family(*sides, int(g.integers(2**31)), stored)
    if dtype == "float16":
        top = float(np.finfo(np.float16).max)
        cost = np.where(np.isinf(base), base, base.clip(-top, top)).astype(np.float16)
        return Problem("", cost, False, cost.astype(np.float64))
    if g.random() < 0.7:
        return Problem("", base, False, base.astype(np.float64))
    name = list(DISTORTIONS)[g.integers(len(DISTORTIONS))]
    cost = DISTORTIONS[name](g, base).astype(base.dtype)
    # Sums of entries of such different sizes are rounded to the largest.
    scale = float(np.abs(np.where(np.isfinite(cost), cost, 0)).max(initial=0)) if name in UNEVEN else 0.0
    return Problem(f", {name}", cost, False, cost.astype(np.float64), scale=scale)


def _normalized(cost: np.ndarray) -> np.ndarray:
    """Return the matrix with its largest finite entry at size 1."""
    finite = np.isfinite(cost)
    top = np.abs(np.where(finite, cost, 0)).max(initial=0)
    return cost / top if top > 0 else cost


def power(g: Generator, cost: np.ndarray) -> np.ndarray:
    limits = np.finfo(cost.dtype)
    return np.ldexp(_normalized(cost), int(g.integers(limits.minexp - 10, limits.maxexp)))


def near_largest(g: Generator, cost: np.ndarray) -> np.ndarray:
    return _normalized(cost) * np.finfo(cost.dtype).max * g.choice(np.array([1, 0.5, 1e-2], cost.dtype))


def below_normal(g: Generator, cost: np.ndarray) -> np.ndarray:
    steps = np.rint(_normalized(cost) * g.choice([3, 1000]))
    return steps.astype(cost.dtype) * np.finfo(cost.dtype).smallest_subnormal


def mixed(g: Generator, cost: np.ndarray) -> np.ndarray:
    decades = 300 if cost.dtype == np.float64 else 37
    return _normalized(cost) * (10.0 ** g.uniform(-decades, decades, cost.shape)).astype(cost.dtype)


def sentinels(g: Generator, cost: np.ndarray) -> np.ndarray:
    """Most entries are the largest float. A matching without it may or may not be left."""
    limits = np.finfo(cost.dtype)
    value = g.choice(np.array([limits.max, limits.max / 2, limits.max / 1000, 1e9], cost.dtype))
    out = np.where(g.random(cost.shape) < g.choice([0.1, 0.5, 0.95]), value, _normalized(cost))
    k = min(cost.shape)
    if g.random() < 0.7:
        rows, columns = g.permutation(cost.shape[0])[:k], g.permutation(cost.shape[1])[:k]
        out[rows, columns] = _normalized(cost)[rows, columns]
        out[rows, columns] = np.where(np.isinf(out[rows, columns]), 1, out[rows, columns])
        return out
    return np.where(np.isinf(out), value, out)


def shifted(g: Generator, cost: np.ndarray) -> np.ndarray:
    return _normalized(cost) + g.choice(np.array([1e3, 1e6, -1e6, 1e12], cost.dtype))


def with_scaled_rows(g: Generator, cost: np.ndarray) -> np.ndarray:
    return _normalized(cost) * (10.0 ** g.uniform(-12, 12, (len(cost), 1))).astype(cost.dtype)


def quantized(g: Generator, cost: np.ndarray) -> np.ndarray:
    return np.rint(_normalized(cost) * int(g.integers(1, 9)))


UNEVEN = ("mixed from the smallest to the largest", "rows scaled")
"""Distortions that leave entries of very different sizes."""

DISTORTIONS: dict[str, Callable[[Generator, np.ndarray], np.ndarray]] = {
    "times a power of two": power,
    "near the largest float": near_largest,
    "below the smallest normal": below_normal,
    UNEVEN[0]: mixed,
    "with sentinels": sentinels,
    "shifted": shifted,
    UNEVEN[1]: with_scaled_rows,
    "quantized": quantized,
}


def _dressed(g: Generator, found: Problem) -> Problem:
    """Return the problem in a random sense, layout and way, perhaps with a warm start or a solver of its own."""
    cost, told = found.cost, found.told
    negative = cost.dtype.kind == "f" or (
        cost.dtype.kind == "i" and cost.size and int(cost.min()) > np.iinfo(cost.dtype).min
    )
    maximize = bool(negative and g.random() < 0.4)
    if maximize:
        cost, told = -cost, told + ", maximized"
    layout = str(g.choice(list(LAYOUTS), p=[0.6, 0.1, 0.05, 0.05, 0.05, 0.1, 0.05]))
    cost = LAYOUTS[layout](cost)
    way = str(g.choice(["solve", "linear_sum_assignment", "solve_batched"], p=[0.8, 0.1, 0.1]))
    warm = solver = None
    if way == "solve" and g.random() < 0.2:
        warm = str(g.choice(list(WARM)))
    if way == "solve" and g.random() < 0.3:
        solver = SOLVERS[g.integers(len(SOLVERS))]
    told += "" if layout == "rows" else f", {layout}"
    told += (
        f", {way}" + (f", warm start of {warm}" if warm else "") + (f", {solver.__name__}" if solver else "")
    )
    return replace(found, told=told, cost=cost, maximize=maximize, way=way, warm=warm, solver=solver)


def _strided(cost: np.ndarray) -> np.ndarray:
    wide = np.zeros((2 * cost.shape[0], 3 * cost.shape[1]), cost.dtype)
    wide[::2, 1::3] = cost
    return wide[::2, 1::3]


def _read_only(cost: np.ndarray) -> np.ndarray:
    out = cost.copy()
    out.flags.writeable = False
    return out


def _guarded(cost: np.ndarray) -> np.ndarray:
    """Return the matrix in memory that ends where no process may read."""
    page = mmap.PAGESIZE
    size = -(-cost.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), page, 0):
        raise OSError("mprotect")
    out = np.frombuffer(memory, cost.dtype, cost.size, size - cost.nbytes).reshape(cost.shape)
    out[...] = cost
    return out


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "reversed": lambda cost: np.ascontiguousarray(cost[::-1, ::-1])[::-1, ::-1],
    "strided": _strided,
    "read-only": _read_only,
    "before a guard page": _guarded,
    "swapped bytes": lambda cost: cost.astype(cost.dtype.newbyteorder(">")),
}


def _other(cost: np.ndarray, g: Generator) -> np.ndarray:
    return g.standard_normal(cost.shape)


def _noisy(cost: np.ndarray, g: Generator) -> np.ndarray:
    finite = np.where(np.isfinite(cost), cost, 0).astype(np.float64)
    top = np.abs(finite).max(initial=0)
    return finite + 0.01 * (top if top < 1e300 else 0) * g.random(cost.shape)


def _scaled(by: float) -> Callable[[Any], Any]:
    return lambda found: replace(found, u=found.u * by, v=found.v * by)


WARM: dict[str, tuple[Callable[[np.ndarray, Generator], np.ndarray], Callable[[Any], Any]]] = {
    "itself": (lambda cost, g: cost, lambda found: found),
    "a noisy copy": (_noisy, lambda found: found),
    "another problem": (_other, lambda found: found),
    "another problem, 1e14 times larger": (_other, _scaled(1e14)),
    "another problem, 1e-14 times smaller": (_other, _scaled(1e-14)),
    "itself, 1e3 times larger": (lambda cost, g: cost, _scaled(1e3)),
    "huge duals": (_other, _scaled(1e300)),
}


def warm_start(found: Problem, seed: int) -> Any:
    """Return the solution that a problem starts from, or None."""
    if found.warm is None:
        return None
    make, change = WARM[found.warm]
    with np.errstate(over="ignore"):
        return change(solve(make(found.cost, np.random.default_rng(seed)), maximize=found.maximize))
