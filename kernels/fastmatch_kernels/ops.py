"""The public operations. Each runs on a backend chosen by the tensors' device, or by name.

``backend=None`` takes "triton" for CUDA and HIP tensors and "cpu" for CPU tensors. "reference" is plain torch on any
device. A backend that is asked for is used, or the call fails; another never replaces it.

An operation checks its arguments once and works under ``torch.compile``, as a ``torch.library`` custom op with a fake
implementation. Backends are imported when they are first used: importing this module loads neither triton nor numba.
"""

from __future__ import annotations

from fastmatch_kernels._dispatch import backend_of
from fastmatch_kernels.channel_affine import channel_affine
from fastmatch_kernels.gain import gain
from fastmatch_kernels.moments import moments
from fastmatch_kernels.permute_merge import permute_merge
from fastmatch_kernels.row_softmin import row_softmin, sinkhorn_duals
from fastmatch_kernels.row_topk import row_min, row_topk

__all__ = [
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
