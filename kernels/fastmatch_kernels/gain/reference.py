"""The dense gain ``G (+)= sum_k A_k B_k^T`` with B's rows and the contraction axis reordered; plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["gain", "rank_update"]


def gathered(
    b: torch.Tensor, b_index: torch.Tensor | None, contraction_index: torch.Tensor | None
) -> torch.Tensor:
    """``b[b_index][:, contraction_index]``."""
    if b_index is not None:
        b = b.index_select(0, b_index)
    if contraction_index is not None:
        b = b.index_select(1, contraction_index)
    return b


def gain(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    b_index: torch.Tensor | None,
    contraction_index: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    accumulate: bool,
    precision: str = "ieee",
) -> None:
    """Writes ``sum_k a[k] @ b[k][b_index][:, contraction_index[k]].T`` to ``out``, or adds it; float64 inside.

    Args:
        a, b: matrices (n, d_k), (m, d_k) of one dtype.
        b_index: (m,) int64 or None.
        contraction_index: per pair (d_k,) int64 or None.
        out: (n, m) float32 or float64.
        accumulate: add to what ``out`` holds.
        precision: of the products; float64 is above them all.
    """
    total = out.double() if accumulate else torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for first, second, index in zip(a, b, contraction_index, strict=True):
        total += first.double() @ gathered(second.double(), b_index, index).T
    out.copy_(total)


def rank_update(
    a: torch.Tensor, b: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair of (n, r) and (m, r) factors by which a gain changes when the contraction axis is reordered.

    Where the index of B's contraction axis goes from ``old`` to ``new``, only the r columns where they differ
    matter: ``A[:, r] (B[:, new[r]] - B[:, old[r]])^T``. Pass it to ``gain(..., out=gain, accumulate=True)``.

    Args:
        a, b: (n, d) and (m, d).
        old, new: (d,) int64.
    """
    changed = torch.nonzero(old != new).flatten()
    return a[:, changed], b[:, new[changed]] - b[:, old[changed]]
