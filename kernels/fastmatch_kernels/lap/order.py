"""The order in which free rows go along paths."""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit

__all__ = ["shuffle", "sort_by"]


@njit(nogil=True, cache=True, borrows=True)
def shuffle(items, count):  # pragma: no cover - compiled
    """Put items[:count] in a fixed random order.

    Rows that follow each other are often alike. In their own order, each one's path moves all earlier ones away again.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    for e in range(count - 1, 0, -1):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        k = np.int64((state >> np.uint64(33)) % np.uint64(e + 1))
        items[e], items[k] = items[k], items[e]


@njit(nogil=True, cache=True, borrows=True)
def sort_by(items, begin, end, key):  # pragma: no cover - compiled
    """Put items[begin:end] in the order of their keys, the least first (Shell 1959, with the gaps of Knuth).

    Rows with the least costs go first along paths: units of large norm, or of high degree. Rows that come later are not worth their
    columns, and do not move them. In a random order of such rows, paths scan a third more, and up to 20 times as much.
    """
    gap = 1
    while 3 * gap + 1 < end - begin:
        gap = 3 * gap + 1
    while gap > 0:
        for e in range(begin + gap, end):
            item, at = items[e], e
            x = key[item]
            while at >= begin + gap and key[items[at - gap]] > x:
                items[at] = items[at - gap]
                at -= gap
            items[at] = item
        gap //= 3
