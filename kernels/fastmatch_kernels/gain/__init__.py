"""The dense gain matrix of factors: ``gain``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import Backend, Operation, Precision, check_choice
from fastmatch_kernels._factors import Factors, check_factors, result_dtype
from fastmatch_kernels.gain.reference import GainArguments

__all__ = ["gain"]

_gain = Operation("gain", GainArguments, lambda arguments: None, mutates=("out",))


def gain(
    factors: Factors,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    precision: Precision = "ieee",
    backend: Backend | None = None,
) -> Tensor:
    """Return the gain matrix ``G = sum_k A_k @ B_k[b_index][:, contraction_index[k]].T``; B is reordered as it is read or packed.

    Example:
        >>> from fastmatch_kernels.ops import gain
        >>> a, b = torch.randn(4, 3), torch.randn(5, 3)
        >>> order = torch.tensor([2, 0, 1])
        >>> matrix = gain([(a, b)], contraction_index=order)
        >>> torch.allclose(matrix, a @ b[:, order].T, atol=1e-6)
        True
        >>> more = gain([(a, b)], out=matrix, accumulate=True)

    Args:
        factors: pairs (n, d_k), (m, d_k) of one floating point dtype; float64 not on "triton". Any strides.
        b_index: (m',) int64, the rows of B to use, in order. All m by default.
        contraction_index: (d_k,) int64 for all pairs, or a list with an index or None for each pair: the order of
            B's columns. Indices may be on the CPU, where checking them costs a GPU no wait.
        out: (n, m') float32 (float64 for float64 factors), written and returned.
        accumulate: add to ``out`` instead of overwriting it. A change of rank r costs ``2 n m r`` operations this way.
        precision: of float32 products on "triton": "ieee", "fp16" (11 bits of each factor) or "fp16x3" (22). On "cpu" always float32.
        backend: "triton", "cpu" or "reference"; by the tensors' device if None.

    Returns:
        (n, m') float32 (float64 for float64 factors).

    Raises:
        TypeError: factors or an index of a wrong dtype.
        ValueError: shapes, entries of an index, devices or options that do not fit.
    """
    check_choice("precision", precision, Precision)
    a, b, rows, contractions, shape, chosen = check_factors(factors, b_index, contraction_index, backend)
    dtype = result_dtype(a[0])
    if accumulate and out is None:
        raise ValueError("out: expected the gain to add to, got None")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=a[0].device)
    elif out.shape != shape or out.dtype != dtype or out.device != a[0].device:
        raise ValueError(
            f"out: expected {shape} of {dtype} on {a[0].device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    _gain(GainArguments(a, b, rows, contractions, out, accumulate, precision), chosen)
    return out
