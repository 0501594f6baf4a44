"""Whether a certified assignment is the only best one, so that other exact solvers return it too."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment.solution import Assignment

__all__ = ["is_only_optimum"]

MARGIN = 64.0
"""Certificates' gaps and bounds by which every other assignment must be worse: two for this solver's, the rest for another's, whose
duals may be larger and its bound with them."""

FEW_TIGHT = 4
"""Tight entries beside the matched ones, by rows, beyond which ties are taken for granted."""


def is_only_optimum(matrix: np.ndarray, found: Assignment, *, maximize: bool) -> bool:
    """Return whether every other assignment of a square matrix is worse, by more than rounding.

    Another assignment gives some rows the columns of others, in a cycle. If every cycle holds an entry whose reduced cost
    exceeds the rounding, none is as good. So the entries of smaller reduced cost must form no cycle. False may also mean that there
    are so many of them that nobody looked.

    Args:
        matrix: (n, n), as it was solved.
        found: its solution.
        maximize: whether the largest total was asked for.
    """
    if not found.is_certified:
        return False
    n = len(matrix)
    reduced = matrix - found.u[:, None] - found.v
    if maximize:
        np.negative(reduced, out=reduced)
    reduced[found.row_ind, found.col_ind] = np.inf
    rows, columns = np.nonzero(reduced <= MARGIN * (abs(found.gap) + found.gap_bound))
    if len(rows) > FEW_TIGHT * n:
        return False
    owner = np.empty(n, np.int64)
    owner[found.col_ind] = found.row_ind
    return _is_acyclic(n, rows.tolist(), owner[columns].tolist())


def _is_acyclic(n: int, tails: list[int], heads: list[int]) -> bool:
    """Return whether a directed graph of n nodes has no cycle: its nodes can be removed, each when no edge leads to it."""
    followers: list[list[int]] = [[] for _ in range(n)]
    entering = [0] * n
    for tail, head in zip(tails, heads, strict=True):
        followers[tail].append(head)
        entering[head] += 1
    free = [node for node in range(n) if entering[node] == 0]
    removed = 0
    while free:
        removed += 1
        for head in followers[free.pop()]:
            entering[head] -= 1
            if entering[head] == 0:
                free.append(head)
    return removed == n
