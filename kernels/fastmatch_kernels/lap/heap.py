"""An indexed binary heap: ``heap`` holds items, ``where`` each item's place, ``key`` what they are ordered by."""

from __future__ import annotations

from fastmatch_kernels._numba.cache import njit

__all__ = ["pop", "sift_up"]


@njit(nogil=True, cache=True, forceinline=True, borrows=True)
def sift_up(heap, where, key, at):  # pragma: no cover - compiled
    """Move the item at place ``at`` up until its parent's key is no larger."""
    item = heap[at]
    k = key[item]
    while at > 0:
        parent = (at - 1) >> 1
        other = heap[parent]
        if key[other] <= k:
            break
        heap[at] = other
        where[other] = at
        at = parent
    heap[at] = item
    where[item] = at


@njit(nogil=True, cache=True, inner=True)
def pop(heap, where, key, size):  # pragma: no cover - compiled
    """Remove and return the item of least key. The heap holds size - 1 items afterwards."""
    least = heap[0]
    where[least] = -2
    last = heap[size - 1]
    size -= 1
    if size > 0:
        k = key[last]
        at = 0
        while True:
            child = 2 * at + 1
            if child >= size:
                break
            if child + 1 < size and key[heap[child + 1]] < key[heap[child]]:
                child += 1
            if key[heap[child]] >= k:
                break
            heap[at] = heap[child]
            where[heap[at]] = at
            at = child
        heap[at] = last
        where[last] = at
    return least
