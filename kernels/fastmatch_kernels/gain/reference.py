"""The dense gain in plain torch: ``G (+)= sum_k A_k B_k^T`` with B's rows and the contraction axis reordered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GainArguments", "gain", "gathered", "rank_update"]


class GainArguments(NamedTuple):
    """Checked arguments of :func:`fastmatch_kernels.ops.gain`, whose backends write ``out``."""

    a: Sequence[Tensor]  # per pair (n, d_k), all of one dtype
    b: Sequence[Tensor]  # per pair (m, d_k)
    b_index: Tensor | None  # (m',) int64
    contraction_index: Sequence[Tensor | None]  # per pair (d_k,) int64
    out: Tensor  # (n, m') float32 or float64
    accumulate: bool
    precision: str


def gathered(b: Tensor, b_index: Tensor | None, contraction_index: Tensor | None) -> Tensor:
    """Return ``b[b_index][:, contraction_index]``."""
    if b_index is not None:
        b = b.index_select(0, b_index)
    if contraction_index is not None:
        b = b.index_select(1, contraction_index)
    return b


def gain(arguments: GainArguments) -> None:
    """Sum in float64, whatever the precision asked for."""
    a, b, b_index, contraction_index, out, accumulate, _ = arguments
    total = out.double() if accumulate else torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for first, second, index in zip(a, b, contraction_index, strict=True):
        total += first.double() @ gathered(second.double(), b_index, index).T
    out.copy_(total)


def rank_update(a: Tensor, b: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (n, r) and (m, r) of the change of a gain when B's contraction index goes from ``old`` to ``new``.

    Only the r columns where the two differ matter: ``A[:, r] (B[:, new[r]] - B[:, old[r]])^T``. Pass the pair to
    ``gain(..., out=gain, accumulate=True)``.

    Args:
        a: (n, d).
        b: (m, d).
        old: (d,) int64.
        new: (d,) int64.
    """
    changed = torch.nonzero(old != new).flatten()
    return a[:, changed], b[:, new[changed]] - b[:, old[changed]]
