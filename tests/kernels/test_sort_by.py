"""The order in which rows go along paths."""

from __future__ import annotations

import numpy as np
import pytest

from fastmatch_kernels.lap.order import sort_by
from helpers.networks import fresh_seed


@pytest.mark.parametrize(("begin", "end"), [(0, 500), (16, 500), (0, 1), (5, 5), (16, 3), (100, 102)])
@pytest.mark.parametrize("ties", [False, True])
def test_a_stretch_is_sorted_and_the_rest_stays(begin, end, ties):
    g = np.random.default_rng(fresh_seed())
    key = g.integers(5, size=600).astype(float) if ties else g.standard_normal(600)
    key[g.integers(600, size=20)] = np.inf
    items = g.permutation(600)[:500]
    found = items.copy()
    sort_by(found, begin, end, key)
    stretch = slice(begin, max(begin, end))
    assert (np.diff(key[found[stretch]][np.isfinite(key[found[stretch]])]) >= 0).all()
    assert sorted(found[stretch]) == sorted(items[stretch])
    outside = np.ones(500, bool)
    outside[stretch] = False
    assert (found[outside] == items[outside]).all()
    keys = key[found[stretch]]
    assert (keys[:-1] <= keys[1:]).all()
