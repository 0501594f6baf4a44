"""The entries of ``row_topk`` and ``row_min``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import PRECISIONS, check_precision, module_of, run
from fastmatch_kernels._factors import Factors, check_duals, check_factors

__all__ = ["row_min", "row_topk"]

ROW_PRECISIONS = (*PRECISIONS, "bf16")


def _row_topk(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    v: Tensor,
    k: int,
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    precision: str,
    sizes: Tensor | None,
    tile: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return module_of(backend, "row_topk").row_topk(
        list(zip(a, b, strict=True)),
        v,
        k,
        b_index=b_index,
        contraction_index=list(contraction_index),
        precision=precision,
        sizes=sizes,
        tile=tuple(tile),
    )


_row_topk_op = torch.library.custom_op("fastmatch::row_topk", mutates_args=())(_row_topk)


@_row_topk_op.register_fake
def _(
    a, b, v, k, b_index, contraction_index, precision, sizes, tile, backend
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    n = a[0].shape[0]
    return (
        a[0].new_empty(n, k, dtype=torch.int64),
        a[0].new_empty(n, k, dtype=dtype),
        a[0].new_empty(n, dtype=dtype),
    )


def _row_min(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    v: Tensor,
    b_index: Tensor | None,
    contraction_index: Sequence[Tensor | None],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return module_of(backend, "row_topk").row_min(
        list(zip(a, b, strict=True)),
        v,
        b_index=b_index,
        contraction_index=list(contraction_index),
        precision=precision,
    )


_row_min_op = torch.library.custom_op("fastmatch::row_min", mutates_args=())(_row_min)


@_row_min_op.register_fake
def _(a, b, v, b_index, contraction_index, precision, backend) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    n = a[0].shape[0]
    return a[0].new_empty(n, dtype=dtype), a[0].new_empty(n, dtype=torch.int64)


def _check_screening(precision: str, dtype: torch.dtype, backend: str) -> None:
    if precision != "bf16" or backend == "reference":
        return
    if backend != "cpu":
        raise ValueError(f"precision: 'bf16' is of backend 'cpu', got {backend!r}, which takes {PRECISIONS}")
    if dtype == torch.float64:
        raise ValueError("precision: 'bf16' takes factors of at most float32, got torch.float64")


def row_topk(
    factors: Factors,
    v: Tensor,
    k: int,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: str = "ieee",
    sizes: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row k columns of smallest ``c_ij - v_j``, ``c = -gain(factors)``, and a bound on all the others.

    The n x m matrix is never stored. Entries not above the bound are the row's smallest, in order; what is
    outside the list is at least the bound, rounding included.

    Args:
        factors, b_index, contraction_index, backend: as for :func:`gain`.
        precision: as for :func:`gain`, or "bf16" for factors up to float32 on "cpu": one product of factors rounded to
            bfloat16, each entry lowered by a bound on what the rounding took. Costs and minima are then at most the
            true ones (but for float32's rounding), the bound as valid as ever. For processors with bfloat16 matrix
            units; slow elsewhere.
        v: (m,) column duals; -inf keeps a column out of every list.
        k: how many, at least 0.
        sizes: (n,) float64, ``sum_k |a_ik| max_j |b_jk|`` or more, where the caller knows it: the bound needs it, and
            computing it reads the factors once more. "bf16" has no use for it.
        tile: rows and columns computed at a time on "cpu"; the other backends have their own.

    Returns:
        (indices (n, k) int64, costs c (n, k), bound (n,)); -1 and +inf where a row has fewer than k entries.

    Raises:
        ValueError, TypeError: shapes, types, indices or options that do not fit.
    """
    check_precision(precision, ROW_PRECISIONS)
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    a, b, contractions, (n, m), chosen = check_factors(factors, b_index, contraction_index, backend)
    _check_screening(precision, a[0].dtype, chosen)
    check_duals(v, m, a[0].device)
    if sizes is not None and (
        sizes.shape != (n,) or sizes.dtype != torch.float64 or sizes.device != v.device
    ):
        raise ValueError(
            f"sizes: expected {n} float64 numbers on {v.device}, "
            f"got {tuple(sizes.shape)} of {sizes.dtype} on {sizes.device}"
        )
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
    return run(
        _row_topk_op, _row_topk, a, b, v, k, b_index, contractions, precision, sizes, tile or (), chosen
    )


def row_min(
    factors: Factors,
    v: Tensor,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: str = "ieee",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row the smallest ``c_ij - v_j`` (n,) and its column (n,) int64; arguments as :func:`row_topk`."""
    check_precision(precision, ROW_PRECISIONS)
    a, b, contractions, (_, m), chosen = check_factors(factors, b_index, contraction_index, backend)
    _check_screening(precision, a[0].dtype, chosen)
    check_duals(v, m, a[0].device)
    return run(_row_min_op, _row_min, a, b, v, b_index, contractions, precision, chosen)
