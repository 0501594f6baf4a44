"""Copies of arrays within kernels."""

from __future__ import annotations

from fastmatch_kernels._numba.cache import njit

__all__ = ["copy_to"]


@njit(nogil=True, cache=True, inner=True)
def copy_to(to, given):  # pragma: no cover - compiled
    """Copy an array. numba's slice assignment would compile the text of its error message, which takes two seconds."""
    for k in range(to.shape[0]):
        to[k] = given[k]
