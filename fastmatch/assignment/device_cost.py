"""Costs stored as a matrix on a GPU: their rows are read there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastmatch.assignment.cost import row_index

__all__ = ["DeviceCost"]

BATCH_ENTRIES = 1 << 25
"""Entries that are read at once: 256 MB in float64."""

SETTLING = 4
"""Entries per row that are computed again in float64 for a row's minimum."""


class DeviceCost:
    """A matrix that stays on its device. Only a few numbers per row come to the host.

    Reading all rows of a matrix on a GPU takes as long as its memory needs, while the whole matrix may be more than the
    host holds. A Triton kernel screens entries in float32; those that a decision rests on are compared in float64. :func:`fastmatch.assignment.solve` wraps large tensors on a GPU by itself.

    Example:
        >>> cost = fm.assignment.DeviceCost(torch.randn(300, 300, dtype=torch.float64))
        >>> fm.solve(cost, maximize=True).is_certified
        True

    Args:
        matrix: (n, m) floating-point tensor of any strides, on a device that has float64.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not two-dimensional.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point():
            kind = getattr(matrix, "dtype", type(matrix).__name__)
            raise TypeError(f"matrix: expected a floating-point torch tensor, got {kind}")
        if matrix.ndim != 2:
            raise ValueError(f"cost: expected a matrix, got {matrix.ndim} dimensions")
        self.matrix = matrix.detach().resolve_neg()
        self.shape: tuple[int, int] = (matrix.shape[0], matrix.shape[1])
        self._sizes: torch.Tensor | None = None
        """(n,) float64: the largest absolute value of each row, computed on first use."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.matrix.dtype}, {self.matrix.device})"

    @property
    def T(self) -> DeviceCost:
        """The transposed cost; the entries are shared."""
        return type(self)(self.matrix.T)

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k columns of least ``sign * c - v`` of each row: see :meth:`Cost.row_topk`.

        The bound is the least value outside the list, or up to float32's rounding less where a kernel screens.
        """
        rows = np.arange(self.shape[0]) if rows is None else np.asarray(rows, np.int64)
        m = self.shape[1]
        k = min(k, m)
        if self._has_kernel(k):
            return self._screened(v, k, rows, sign)
        items = np.empty((len(rows), k), np.int32)
        costs = np.empty((len(rows), k))
        bound = np.full(len(rows), np.inf)
        duals = self._on_device(v)
        for place, values in self._batches(rows, sign):
            least, found = torch.topk(values - duals, min(k + 1, m), largest=False)
            items[place] = found[:, :k].to(torch.int32).cpu().numpy()
            costs[place] = values.gather(1, found[:, :k]).cpu().numpy()
            if k < m:
                bound[place] = least[:, k].cpu().numpy()
        return items, costs, bound

    def row_min(self, v: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """Return (n,) float64, the least ``sign * c - v`` of each row."""
        out, rows = np.empty(self.shape[0]), np.arange(self.shape[0])
        k = min(SETTLING, self.shape[1])
        if self._has_kernel(k):
            items, costs, bound = self._screened(v, k, rows, sign)
            out = np.where(items >= 0, costs - v[items], np.inf).min(axis=1)
            rows = np.flatnonzero(out > bound)  # which float32 leaves open
        duals = self._on_device(v)
        for place, values in self._batches(rows, sign):
            out[rows[place]] = (values - duals).amin(1).cpu().numpy()
        return out

    def _has_kernel(self, k: int) -> bool:
        """Return whether a kernel screens the matrix for lists of k entries."""
        if not k or not self.matrix.is_cuda:
            return False
        from fastmatch_kernels.row_topk import has_matrix_topk

        return has_matrix_topk(self.matrix, k)

    def _screened(
        self, v: np.ndarray, k: int, rows: np.ndarray, sign: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what :meth:`row_topk` returns, by one read in float32; the bound is lowered by its rounding."""
        from fastmatch_kernels.row_topk import matrix_topk

        at = torch.from_numpy(rows).to(self.matrix.device)
        sizes = self._sizes
        if sizes is None:
            sizes = torch.linalg.vector_norm(self.matrix, torch.inf, dim=1, dtype=torch.float32).double()
            self._sizes = sizes
        found, bound = matrix_topk(self.matrix, at, sizes[at], self._on_device(v), k, sign)
        values = sign * self.matrix[at[:, None], found.clamp(min=0)].double()
        costs = torch.where(found < 0, torch.inf, values)
        if k == self.shape[1]:
            bound = torch.full_like(bound, torch.inf)
        return found.to(torch.int32).cpu().numpy(), costs.cpu().numpy(), bound.cpu().numpy()

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return (len(rows),) float64, the entries at (rows, cols)."""
        at = (torch.from_numpy(np.asarray(x, np.int64)).to(self.matrix.device) for x in (rows, cols))
        return self.matrix[tuple(at)].double().cpu().numpy()

    def entry_error(self) -> np.ndarray:
        """Return zeros: entries are stored."""
        return np.zeros(self.shape[0])

    def is_finite(self) -> bool:
        """Return whether no entry is NaN or infinite. It reads the matrix once."""
        return all(bool(torch.isfinite(part).all()) for part in self.matrix.split(self._step()))

    def _step(self) -> int:
        """Return how many rows are read at once."""
        return max(1, BATCH_ENTRIES // max(self.shape[1], 1))

    def _on_device(self, v: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(self.matrix.device)

    def _batches(self, rows: np.ndarray, sign: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield ranges of ``rows`` and ``sign * matrix`` there in float64, which may be a view of the matrix."""
        step = self._step()
        for lo in range(0, len(rows), step):
            part = rows[lo : lo + step]
            values = self.matrix[row_index(part, self.matrix.device)]
            yield slice(lo, lo + len(part)), (values if sign > 0 else -values).double()
