"""What a cost is to the solvers: questions about rows, answered without naming how the entries are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

__all__ = ["Cost", "SoftCost", "row_index"]


@runtime_checkable
class Cost(Protocol):
    """An (n, m) cost whose rows can be read in batches.

    :class:`DenseCost`, :class:`FactorCost` and :class:`DeviceCost` are costs. A class of your own needs these members only;
    :class:`CandidateLists` solves it. In all methods ``sign`` is 1 for a minimisation and -1 for a maximisation, and ``v``
    holds the column duals, (m,) float64.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    @property
    def T(self) -> Cost:
        """The transposed cost; it copies no entries."""
        ...

    def row_topk(
        self, v: np.ndarray, k: int, rows: np.ndarray | None = None, sign: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k columns of least ``sign * c_ij - v_j`` of each row, and a lower bound on all others.

        Args:
            v: (m,) float64 column duals.
            k: entries per row; at most m are returned.
            rows: (r,) row indices; None for all.
            sign: 1 or -1.

        Returns:
            (columns (r, k) int32, ``sign * c`` there (r, k) float64, bound (r,) float64); the bound is inf if no column
            is left out.
        """
        ...

    def row_min(self, v: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """Return (n,) float64, the least ``sign * c_ij - v_j`` of each row; never above the true one but for rounding."""
        ...

    def entries(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Return (len(rows),) float64, the entries at (rows, cols)."""
        ...

    def entry_error(self) -> np.ndarray:
        """Return (n,) float64, a bound by row on the rounding of :meth:`entries`; 0 if entries are stored."""
        ...


@runtime_checkable
class SoftCost(Cost, Protocol):
    """A cost that also proposes column duals to start from. :class:`FactorCost` is one."""

    def first_duals(self, sign: float) -> np.ndarray:
        """Return (m,) float64 column duals that cost about one pass over the rows."""
        ...

    @property
    def has_soft_duals(self) -> bool:
        """Whether :meth:`sinkhorn_duals` takes this cost."""
        ...

    def sinkhorn_duals(
        self, v: np.ndarray, temperatures: Sequence[float], sign: float = 1.0, relaxation: float = 1.0
    ) -> np.ndarray:
        """Return (m,) float64 column duals by Sinkhorn's iteration from ``v`` at falling temperatures."""
        ...


def row_index(rows: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """Return an index of the rows: a slice, which copies nothing, if they are consecutive."""
    if len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
