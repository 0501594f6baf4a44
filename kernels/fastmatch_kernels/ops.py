"""Picks a backend for each operation: by the tensors' device, or as asked. Registered with torch.library.

``backend=None`` takes "triton" for CUDA and HIP tensors and "cpu" for CPU tensors; "reference" is the plain
torch form, on any device. What is asked for explicitly is used or fails, it is never replaced by another.
Arguments are checked in :mod:`fastmatch_kernels.entries`, once, and trusted below. Every operation is a
``torch.library`` custom op with a fake implementation, so ``torch.compile`` traces through it.

Backends are imported on first use: importing this module loads neither triton nor numba.
"""

from __future__ import annotations

from fastmatch_kernels._dispatch import BACKENDS, backend_of
from fastmatch_kernels.channel_affine import channel_affine
from fastmatch_kernels.gain import gain
from fastmatch_kernels.moments import moments
from fastmatch_kernels.permute_merge import permute_merge
from fastmatch_kernels.row_softmin import row_softmin, sinkhorn_duals
from fastmatch_kernels.row_topk import row_min, row_topk

__all__ = [
    "BACKENDS",
    "backend_of",
    "channel_affine",
    "gain",
    "moments",
    "permute_merge",
    "row_min",
    "row_softmin",
    "row_topk",
    "sinkhorn_duals",
]
