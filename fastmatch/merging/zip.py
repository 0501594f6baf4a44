"""ZipIt's greedy pairing (Stoica et al. 2023): merge the two most similar units, within a model too."""

from __future__ import annotations

import numpy as np

__all__ = ["zip_units"]

LAST = np.float32(-1e30)
"""Similarity of a pair that is merged only when no other pair remains."""


def zip_units(
    similarity: np.ndarray, count: int, remaining: int, a: float = 0.3, b: float = 0.125
) -> tuple[np.ndarray, list[float]]:
    """Merge pairs of units until ``remaining`` are left.

    Args:
        similarity: (count n, count n) float32, the units of ``count`` models one model after the other; overwritten.
        count: number of models.
        remaining: number of merged units to end with; they are numbered by their first member.
        a: the similarity of a merged unit to a third one is the smaller similarity of its parts, times this; above 0.
        b: from 0 to 1. With equal shares every model would make ``(count n - remaining) / count`` of the merges. After
            the fraction b of them within itself, a model is merged only with others while that is possible.

    Returns:
        The merged unit of each unit, (count n,) int64, and the similarity of each merged pair in order.

    Raises:
        ValueError: ``a`` is not above 0, or ``remaining`` is less than 1.

    Cost: O((count n)^2) if best partners change rarely; only rows whose partner was merged are searched again.
    """
    if not a > 0:
        raise ValueError(f"a: expected a number above 0, got {a}")
    n = len(similarity)
    budget = np.full(count, int((n - remaining) // count * b + 1e-4))
    root, values = _zip(similarity, np.arange(n) // (n // count), remaining, a, budget)
    return np.unique(root, return_inverse=True)[1], values


def _zip(
    similarity: np.ndarray, origin: np.ndarray, remaining: int, a: float, budget: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Return the unit that each unit was merged into, and the similarity of each pair; overwrites the matrix."""
    n = len(similarity)
    np.fill_diagonal(similarity, -np.inf)
    root = np.arange(n)
    partner = similarity.argmax(axis=1)
    best = similarity[root, partner]
    values: list[float] = []
    for _ in range(n - remaining):
        first = int(best.argmax())
        value = float(best[first])
        if value == -np.inf:
            raise ValueError(f"remaining: expected at least 1, got {remaining}; no pair is left")
        values.append(value)
        kept, gone = sorted((first, int(partner[first])))
        root[root == gone] = kept
        merged = np.minimum(similarity[kept], similarity[gone]) * np.float32(a)
        for k, row in ((gone, np.float32(-np.inf)), (kept, merged)):
            similarity[k] = row
            similarity[:, k] = row
        best[gone] = -np.inf
        look = (partner == kept) | (partner == gone)
        look[kept] = True
        if origin[kept] == origin[gone]:
            budget[origin[kept]] -= 1
            if budget[origin[kept]] <= 0:
                spent = np.flatnonzero(origin == origin[kept])
                block = np.ix_(spent, spent)
                similarity[block] = np.minimum(similarity[block], LAST)
                look[spent] = True
        column = similarity[:, kept]
        better = (column > best) | ((column == best) & (kept < partner))
        partner[better], best[better] = kept, column[better]
        rows = np.flatnonzero(look)
        partner[rows] = similarity[rows].argmax(axis=1)
        best[rows] = similarity[rows, partner[rows]]
    return root, values
