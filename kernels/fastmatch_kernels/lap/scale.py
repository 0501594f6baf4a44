"""A power of two by which costs are multiplied if their sums would leave float64."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.simd import (
    WIDTH,
    difference,
    less_equal_mask,
    less_mask,
    load,
    load_part,
    magnitude,
    maximum,
    minimum,
    reduce_minimum,
    replace_at_most,
    select,
    splat,
)
from fastmatch_kernels.lap.state import HUGE, LARGEST

__all__ = ["fitting_scale"]

ALL = (1 << WIDTH) - 1
"""The mask of a vector whose lanes all hold."""

NEVER = 2.0**880
"""Size from which an entry may stand for "never"."""

ORDINARY = 2.0**750
"""Size up to which sums of entries, over any number of bids and rows, stay below such an entry."""

UP = 2.0**144
"""The factor that makes every entry above NEVER infinite. Sums of ordinary ones stay below HUGE."""

DOWN = 2.0**-128
"""The factor for sums that leave float64."""

EXACT = 2.0**-894
"""Size from which entries lose no bit by the factor DOWN."""


@njit(nogil=True, cache=True)
def fitting_scale(c, begin, end, sign):  # pragma: no cover - compiled
    """Return ``sign`` times a power of two that makes sums of ``c[begin:end]`` representable, and every product exact.

    - 1, if no size exceeds HUGE;
    - UP, if each entry is above NEVER or at most ORDINARY in size. The first kind becomes infinite, which is forbidden: if
      there is an assignment without such entries, the best one is the best of all, and its duals are far below them;
    - DOWN, if no entry loses a bit;
    - inf, if none of these will do;
    - 0, if there is NaN or an infinity of the wrong sign.
    """
    signs, zero, none = splat(sign), splat(0.0), splat(np.inf)
    wrong, ordinary, never, finite = splat(-np.inf), splat(ORDINARY), splat(NEVER), splat(LARGEST)
    top, least, right, apart = zero, none, ALL, ALL
    for j in range(begin, end, WIDTH):
        if j + WIDTH <= end:
            x = difference(signs, load(c, j), zero)
        else:
            x = difference(signs, load_part(c, j, end - j, 0.0), zero)
        size = magnitude(x)
        right &= less_mask(wrong, x)
        apart &= less_equal_mask(size, ordinary) | less_mask(never, x)
        top = maximum(select(finite, size, zero, size), top)
        least = minimum(replace_at_most(size, zero, none), least)
    if right != ALL:
        return 0.0
    largest = -reduce_minimum(difference(splat(-1.0), top, zero))
    if largest <= HUGE:
        return sign
    if apart == ALL:
        return sign * UP
    return sign * DOWN if reduce_minimum(least) >= EXACT else np.inf
