"""Equal lines of a matrix: they are found by a hash, and compared entry by entry before they are used."""

from __future__ import annotations

import numpy as np
import pytest

import fastmatch as fm
from fastmatch.assignment import copies
from fastmatch.assignment.copies import find_copies
from helpers.networks import fresh_seed


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("columns", [True, False])
def test_kinds_are_those_of_a_comparison_of_all_entries(dtype, columns):
    g = np.random.default_rng(fresh_seed())
    kinds = g.integers(0, 3, size=(9, 700)).astype(dtype)  # whole numbers, whose low bits are all zero
    kinds[1] = kinds[0]
    kinds[1, 351] += 1  # a kind that differs in one entry, which the first probes do not see
    lines = kinds[g.integers(9, size=60)]
    matrix = np.ascontiguousarray(lines.T if columns else lines)
    found = find_copies(matrix, 0.5, columns=columns)
    assert found is not None
    distinct, group, room = found
    _, expected, counts = np.unique(lines, axis=0, return_inverse=True, return_counts=True)
    assert sorted(room) == sorted(counts)
    distinct = distinct.T if columns else distinct
    np.testing.assert_array_equal(distinct[group], lines)
    assert len(distinct) == len(set(expected.ravel().tolist()))
    assert np.array_equal(
        np.unique(group, return_index=True)[1], np.sort(np.unique(group, return_index=True)[1])
    )


@pytest.mark.parametrize("columns", [True, False])
def test_lines_that_only_share_a_hash_are_no_copies(monkeypatch, columns):
    matrix = np.random.default_rng(fresh_seed()).standard_normal((40, 40))
    monkeypatch.setattr(copies, "_hashes", lambda matrix, columns: np.zeros(matrix.shape[columns], np.uint64))
    assert find_copies(matrix, 0.5, columns=columns) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("solver", [None, fm.assignment.DenseShortlists()])
def test_a_matrix_of_copies_is_solved_and_proved(transposed, solver):
    g = np.random.default_rng(fresh_seed())
    matrix = g.standard_normal((1100, 20))[:, g.integers(20, size=1100)]
    found = fm.solve(matrix.T if transposed else matrix, solver=solver)
    assert found.gap <= found.gap_bound
    assert sorted(found.col_ind) == list(range(1100))
