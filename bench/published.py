"""The published algorithm of weight matching, written plainly: what ours is measured against.

Coordinate descent of Git Re-Basin (Ainsworth et al. 2022, algorithm 1): every group in a random order,
every sweep, until a sweep gains nothing. numpy and scipy, float64, plain axes only.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from fastmatch.spec import PermutationSpec


def moved(b, spec: PermutationSpec, perms, name: str, skip: int | None = None) -> np.ndarray:
    w = b[name]
    for axis, group in spec.axes_of(name):
        if axis.dim != skip:
            assert axis.inner == axis.outer == 1
            assert axis.start == 0
            w = np.take(w, perms[group], axis=axis.dim)
    return w


def objective(a, b, spec: PermutationSpec, perms) -> float:
    names = {x.parameter for g in spec.groups.values() for x in g.axes}
    return sum(float((a[n] * moved(b, spec, perms, n)).sum()) for n in names)


def weight_matching(state_a, state_b, spec: PermutationSpec, seed: int, max_sweeps: int = 100):
    a, b = ({k: v.double().numpy() for k, v in s.items()} for s in (state_a, state_b))
    perms = {name: np.arange(group.size) for name, group in spec.groups.items()}
    names = list(spec.groups)
    generator = np.random.default_rng(seed)
    for _ in range(max_sweeps):
        progress = False
        for k in generator.permutation(len(names)):
            group = spec.groups[names[k]]
            gain = np.zeros((group.size, group.size))
            for axis in group.axes:
                rows_a = np.moveaxis(a[axis.parameter], axis.dim, 0).reshape(group.size, -1)
                other = moved(b, spec, perms, axis.parameter, skip=axis.dim)
                gain += rows_a @ np.moveaxis(other, axis.dim, 0).reshape(group.size, -1).T
            col = linear_sum_assignment(gain, maximize=True)[1]
            rows = np.arange(group.size)
            progress |= gain[rows, col].sum() > gain[rows, perms[names[k]]].sum() + 1e-12
            perms[names[k]] = col
        if not progress:
            break
    return perms, objective(a, b, spec, perms)
