"""Inner products of two tensors in float64 on CPU, the second read through its indices: no copy of either is made.

Products of float32 are exact in float64, so an error is that of the float64 sum alone.
"""

from __future__ import annotations

import numpy as np

from fastmatch_kernels._numba.cache import njit

__all__ = ["inner"]

_REASSOCIATE = {"reassoc", "contract"}  # lets sums use vector lanes; NaN and inf keep their meaning


@njit(nogil=True, fastmath=_REASSOCIATE)
def inner(
    lo, hi, a, b, rows, columns, now_rows, now_columns, then_rows, then_columns
):  # pragma: no cover - compiled
    """The sum over k in lo..hi and j of <a[:, rows[k], :, columns[j]], b[:, now_rows[k], :, now_columns[j]]>.

    Minus the same with ``then``, where that is not None. a, b: (outer, n1, middle, n2, inner), contiguous;
    indices: unsigned integers.
    """
    total = 0.0
    # What is gathered goes through a row: a sum that waits for every gather takes twice as long.
    terms = np.empty(columns.shape[0])
    for o in range(a.shape[0]):
        for k in range(lo, hi):
            for m in range(a.shape[2]):
                x, y = a[o, rows[k], m], b[o, now_rows[k], m]
                z = y if then_rows is None else b[o, then_rows[k], m]
                for j in range(columns.shape[0]):
                    u, v = x[columns[j]], y[now_columns[j]]
                    if a.shape[4] == 1:
                        step = np.float64(v[0])
                        if then_rows is not None:
                            step -= z[then_columns[j], 0]
                        terms[j] = u[0] * step
                    else:
                        part = 0.0
                        for r in range(a.shape[4]):
                            step = np.float64(v[r])
                            if then_rows is not None:
                                step -= z[then_columns[j], r]
                            part += u[r] * step
                        terms[j] = part
                for j in range(columns.shape[0]):
                    total += terms[j]
    return total
