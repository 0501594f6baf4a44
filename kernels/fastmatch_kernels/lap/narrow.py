"""float64 numbers as float32, if it holds all of them: integers, counts, 0 and 1."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit

__all__ = ["narrow"]

BLOCK = 4096
"""Numbers after each of which the question is asked again. They stay in the nearest cache."""


@njit(nogil=True, cache=True)
def narrow(given, to):  # pragma: no cover - compiled
    """Write the float64 numbers ``given`` to the float32 ``to``, of the same length; return whether they are the same numbers."""
    for begin in range(0, len(given), BLOCK):
        part, out = given[begin : begin + BLOCK], to[begin : begin + BLOCK]
        other = 0
        for k in range(len(part)):
            near = np.float32(part[k])
            out[k] = near
            other |= np.int64(np.float64(near) != part[k])
        if other:
            return False
    return True
