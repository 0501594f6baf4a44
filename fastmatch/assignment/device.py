"""Costs that lie on another device as a whole matrix: their rows are read there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastmatch.assignment.factor import row_index

__all__ = ["StoredCost"]

ENTRIES = 1 << 25
"""Entries read at once: 256 MB in float64."""


class StoredCost:
    """The rows of a stored matrix, answered as :class:`FactorCost` answers them, in exact float64 on its device.

    What comes to the host is a few numbers a row. On a GPU, reading all rows is a matter of its memory's bandwidth, while
    the whole matrix may be more than the host holds.

    Args:
        matrix: (n, m) floating point, of any strides, on a device that has float64; finite.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])

    def _step(self) -> int:
        """Rows read at once."""
        return max(1, ENTRIES // max(self.shape[1], 1))

    def _batches(self, rows: np.ndarray, sign: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """Ranges of ``rows``, and ``sign * matrix`` there in float64; it may be a view of the matrix."""
        step = self._step()
        for lo in range(0, len(rows), step):
            part = rows[lo : lo + step]
            values = self.matrix[row_index(part, self.matrix.device)]
            yield slice(lo, lo + len(part)), (values if sign > 0 else -values).double()

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite; one read."""
        return all(bool(torch.isfinite(part).all()) for part in self.matrix.split(self._step()))

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """(len(rows),) float64: the entries at (rows, cols)."""
        at = (torch.from_numpy(np.asarray(x, np.int64)).to(self.matrix.device) for x in (rows, cols))
        return self.matrix[tuple(at)].double().cpu().numpy()

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As :meth:`FactorCost.row_topk`; the bound is the least value outside itself."""
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        m = self.shape[1]
        k = min(k, m)
        items = np.empty((len(rows), k), np.int32)
        costs = np.empty((len(rows), k))
        bound = np.full(len(rows), np.inf)
        duals = torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(self.matrix.device)
        for place, values in self._batches(rows, sign):
            least, found = torch.topk(values - duals, min(k + 1, m), largest=False)
            items[place] = found[:, :k].to(torch.int32).cpu().numpy()
            costs[place] = values.gather(1, found[:, :k]).cpu().numpy()
            if k < m:
                bound[place] = least[:, k].cpu().numpy()
        return items, costs, bound

    def row_min(self, v: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """(n,) the least ``sign * value_ij - v_j``, in float64."""
        duals = torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(self.matrix.device)
        out = np.empty(self.shape[0])
        for place, values in self._batches(np.arange(self.shape[0]), sign):
            out[place] = (values - duals).amin(1).cpu().numpy()
        return out
