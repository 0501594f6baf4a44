"""Checks that every cost of the assignment answers as its matrix does."""

from __future__ import annotations

import numpy as np

from fastmatch.assignment import Cost


def check_rows(cost: Cost, values: np.ndarray, v: np.ndarray) -> None:
    """Compare row minima and candidate lists of a cost of more than 22 rows with those of its matrix."""
    for sign in (1.0, -1.0):
        reduced = sign * values - v
        np.testing.assert_array_equal(cost.row_min(v, sign), reduced.min(1))
        rows = np.array([0, 1, 2, 7, 22])
        items, costs, bound = cost.row_topk(v, 5, rows, sign)
        np.testing.assert_array_equal(costs, np.take_along_axis(sign * values[rows], items.astype(int), 1))
        ordered = np.sort(reduced[rows], 1)
        np.testing.assert_array_equal(costs - v[items], ordered[:, :5])
        np.testing.assert_array_equal(bound, ordered[:, 5])
        assert np.isinf(cost.row_topk(v, 99, None, sign)[2]).all()
