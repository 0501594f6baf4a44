"""Costs stored as a matrix on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmatch.assignment.reading import as_real

__all__ = ["DenseCost"]

BATCH_ENTRIES = 1 << 22
"""Entries that are read at once: 32 MB in float64."""


@dataclass(frozen=True, eq=False)
class DenseCost:
    """A matrix on the host. :func:`fastmatch.assignment.solve` wraps arrays and tensors in it by itself.

    Example:
        >>> cost = fm.assignment.DenseCost(np.array([[1.0, 2.0], [2.0, 4.0]]))
        >>> fm.solve(cost).objective
        4.0

    Args:
        matrix: (n, m), numpy or torch. It is kept as a numpy array of float32 or float64 and copied only if its type
            demands that: half precision and 8- or 16-bit integers become float32, other integers float64; more than 2^20 integers that float32 holds become float32 too.

    Raises:
        TypeError: the entries are not real numbers of at most float64, or a tensor is sparse, quantized or without memory.
        ValueError: not two-dimensional, masked entries, or integers beyond 2^53 (which :func:`solve` takes as they are).
    """

    matrix: Any

    def __post_init__(self) -> None:
        matrix = as_real(self.matrix)
        if matrix.ndim != 2:
            raise ValueError(f"cost: expected a matrix, got {matrix.ndim} dimensions")
        object.__setattr__(self, "matrix", matrix)

    def __repr__(self) -> str:
        return f"DenseCost({self.shape[0]} x {self.shape[1]}, {self.matrix.dtype})"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.matrix.shape

    @property
    def T(self) -> DenseCost:
        """The transposed cost; the entries are shared."""
        return DenseCost(self.matrix.T)

    @property
    def is_column_major(self) -> bool:
        """Whether the entries of a column, and not those of a row, are contiguous."""
        return self.matrix.flags.f_contiguous and not self.matrix.flags.c_contiguous

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k columns of least ``sign * c - v`` of each row: see :meth:`Cost.row_topk`."""
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        m = self.shape[1]
        k = min(k, m)
        items, costs = np.empty((len(rows), k), np.int32), np.empty((len(rows), k))
        bound = np.full(len(rows), np.inf)
        for place, values in self._batches(rows, sign):
            reduced = values - v
            order = np.argsort(reduced, axis=1, kind="stable")[:, : k + 1]
            items[place] = order[:, :k]
            costs[place] = np.take_along_axis(values, order[:, :k], 1)
            if k < m:
                bound[place] = np.take_along_axis(reduced, order[:, k:], 1)[:, 0]
        return items, costs, bound

    def row_min(self, v: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """Return (n,) float64, the least ``sign * c - v`` of each row."""
        out = np.empty(self.shape[0])
        for place, values in self._batches(np.arange(self.shape[0]), sign):
            out[place] = (values - v).min(axis=1)
        return out

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return (len(rows),) float64, the entries at (rows, cols)."""
        return self.matrix[rows, cols].astype(np.float64)

    def entry_error(self) -> np.ndarray:
        """Return zeros: entries are stored."""
        return np.zeros(self.shape[0])

    def _batches(self, rows: np.ndarray, sign: float) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of ``rows`` and ``sign * matrix`` there in float64."""
        step = max(1, BATCH_ENTRIES // max(self.shape[1], 1))
        for lo in range(0, len(rows), step):
            part = rows[lo : lo + step]
            yield slice(lo, lo + len(part)), sign * self.matrix[part].astype(np.float64)
