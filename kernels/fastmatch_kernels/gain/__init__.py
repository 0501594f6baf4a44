"""The entry of ``gain``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import check_precision, module_of
from fastmatch_kernels._factors import Factors, check_factors

__all__ = ["gain"]


@torch.library.custom_op("fastmatch::gain", mutates_args=("out",))
def _gain(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    out: Tensor,
    accumulate: bool,
    precision: str,
    backend: str,
) -> None:
    module_of(backend, "gain").gain(
        list(a), list(b), b_index, list(contraction_index), out, accumulate, precision
    )


@_gain.register_fake
def _(a, b, b_index, contraction_index, out, accumulate, precision, backend) -> None:
    return None


def gain(
    factors: Factors,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    precision: str = "ieee",
    backend: str | None = None,
) -> Tensor:
    """The gain matrix ``G = sum_k A_k @ B_k[b_index][:, contraction_index[k]].T``, no permuted copy made.

    Example:
        >>> g = gain([(w_a, w_b), (bias_a[:, None], bias_b[:, None])], contraction_index=[inputs, None])
        >>> gain([rank_update(w_a, w_b, inputs, new_inputs)], out=g, accumulate=True)

    Args:
        factors: pairs (n, d_k), (m, d_k) of one dtype; float64 not on "triton". Any strides.
        b_index: (m',) int64, which of B's rows, in which order.
        contraction_index: (d_k,) int64 for every pair, or one per pair or None: the order of B's columns.
        out: (n, m') float32 (float64 for float64 factors), written and returned.
        accumulate: add to what ``out`` holds: a rank-r update costs ``2 n m r`` operations.
        precision: of float32 products on "triton": "ieee", "tf32", "bf16x3". Always float32 on "cpu".
        backend: see :func:`backend_of`.

    Raises:
        ValueError, TypeError: shapes, types, indices or options that do not fit.
    """
    check_precision(precision)
    a, b, contractions, shape, chosen = check_factors(factors, b_index, contraction_index, backend)
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    if accumulate and out is None:
        raise ValueError("out: expected the gain to add to, got None")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=a[0].device)
    elif out.shape != shape or out.dtype != dtype or out.device != a[0].device:
        raise ValueError(
            f"out: expected {shape} of {dtype} on {a[0].device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    _gain(a, b, b_index, contractions, out, accumulate, precision, chosen)
    return out
