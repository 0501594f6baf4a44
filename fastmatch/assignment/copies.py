"""Equal rows or columns of a matrix: one of each kind stands for all."""

from __future__ import annotations

import numpy as np

__all__ = ["find_copies"]

PROBED = (8, 64)
"""Entries by which lines are compared before all of them."""


def find_copies(
    matrix: np.ndarray, below: float, *, columns: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find equal columns (or rows) of a matrix.

    Returns:
        (kinds, group, room): the matrix with one line of each kind, in the order of their first lines, the kind of each line,
        and the lines of each kind. None if there are more than ``below`` times as many kinds as lines.
    """
    lines, entries = matrix.shape[::-1] if columns else matrix.shape
    for count in (*PROBED, entries):
        few = np.unique(np.linspace(0, entries - 1, count).astype(np.int64))
        whole = len(few) == entries
        sample = matrix if whole else matrix[few] if columns else matrix[:, few]
        keys = _hashes(np.ascontiguousarray(sample), columns=columns)
        _, first, group, room = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        if len(first) > below * lines:
            return None
        order = np.argsort(first)
        first, room, group = first[order], room[order], np.argsort(order)[group]
        kinds = (_columns if columns else _rows)(matrix, first, group)
        if kinds is not None:
            return kinds, group, room
        if whole:  # two kinds with one hash
            return None
    return None


def _columns(matrix: np.ndarray, first: np.ndarray, group: np.ndarray) -> np.ndarray | None:
    """Return the columns ``first``; None if a column differs from the first one of its kind."""
    from fastmatch_kernels.lap.copies import take_columns

    kinds = np.empty((len(matrix), len(first)), matrix.dtype)
    return kinds if take_columns(matrix.reshape(-1), first, group, kinds.reshape(-1)) else None


def _rows(matrix: np.ndarray, first: np.ndarray, group: np.ndarray) -> np.ndarray | None:
    """Return the rows ``first``; None if a row differs from the first one of its kind."""
    from fastmatch_kernels.lap.copies import rows_equal

    like = first[group].astype(np.int64)
    copies = np.flatnonzero(like != np.arange(len(like)))
    return matrix[first] if rows_equal(matrix.reshape(-1), matrix.shape[1], copies, like[copies]) else None


def _hashes(matrix: np.ndarray, *, columns: bool) -> np.ndarray:
    """Return a number per column (or row), the same for lines with the same bits, and nearly always only for them."""
    from fastmatch_kernels.lap.copies import hash_columns, hash_rows

    n, m = matrix.shape
    lines, entries = (m, n) if columns else (n, m)
    odd = np.random.default_rng(0).integers(2**63, size=entries, dtype=np.uint64) * 2 + 1
    total = np.zeros(lines, np.uint64)
    bits = matrix.view(f"u{matrix.itemsize}").reshape(-1)
    (hash_columns if columns else hash_rows)(bits, m, odd, total)
    return total
