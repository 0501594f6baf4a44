"""Shortlists and minima of the rows of a cost given by factors: ``row_topk`` and ``row_min``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import (
    Backend,
    Operation,
    Precision,
    RowPrecision,
    backend_of,
    check_choice,
)
from fastmatch_kernels._factors import Factors, check_duals, check_factors, result_dtype
from fastmatch_kernels.row_topk import reference
from fastmatch_kernels.row_topk.reference import RowArguments

__all__ = ["entries", "has_matrix_topk", "matrix_topk", "row_min", "row_topk"]


def _fake_topk(arguments: RowArguments) -> tuple[Tensor, Tensor, Tensor]:
    value, _ = _fake_min(arguments)
    shape = (len(value), arguments.k)
    return value.new_empty(shape, dtype=torch.int64), value.new_empty(shape), value


def _fake_min(arguments: RowArguments) -> tuple[Tensor, Tensor]:
    first = arguments.a[0]
    value = first.new_empty(first.shape[0], dtype=result_dtype(first))
    return value, torch.empty_like(value, dtype=torch.int64)


_row_topk = Operation("row_topk", RowArguments, _fake_topk, returns=tuple[Tensor, Tensor, Tensor])
_row_min = Operation("row_min", RowArguments, _fake_min, returns=tuple[Tensor, Tensor], folder="row_topk")


def entries(factors: Factors, rows: Tensor, items: Tensor, metric: str = "dot") -> Tensor:
    """Return (r, e) float64 entries of the cost at (rows[i], items[i, e]), on the factors' GPU; inf where an item is -1.

    Args:
        factors: pairs (n, d_k), (m, d_k) of any floating point dtypes, rows contiguous.
        rows: (r,) int64.
        items: (r, e) int64.
        metric: "dot", "l2" (squared Euclidean distance) or "l1".
    """
    if rows.is_cuda and backend_of(rows) == "triton":
        from fastmatch_kernels.row_topk import entries_triton

        with torch.cuda.device(rows.device):
            return entries_triton.entries(factors, rows, items, metric)
    return reference.entries(factors, rows, items, metric)


def has_matrix_topk(matrix: Tensor, k: int) -> bool:
    """Whether :func:`matrix_topk` takes a matrix and a length: on a GPU with kernels, of at most float32."""
    if not matrix.is_cuda or backend_of(matrix) != "triton":
        return False
    from fastmatch_kernels.row_topk import stored_triton

    return matrix.dtype in stored_triton.DTYPES and stored_triton.holds(matrix.shape[1], k)


def matrix_topk(
    matrix: Tensor, rows: Tensor, sizes: Tensor, v: Tensor, k: int, sign: float
) -> tuple[Tensor, Tensor]:
    """Return the k columns of least ``sign * c - v`` of some rows of a stored matrix on a GPU, as float32 sees them.

    Args:
        matrix: (any, m).
        rows: (r,) int64, on its device.
        sizes: (r,) float64, at least the largest absolute value of each of these rows.
        v: (m,) float64, on its device.
        k: entries per row.
        sign: 1 or -1.

    Returns:
        (columns (r, k) int64, a valid bound on all others (r,) float64). The bound is exact if v is zero.
    """
    from fastmatch_kernels.row_topk import stored_triton

    with torch.cuda.device(matrix.device):
        found, outside = stored_triton.matrix_topk(matrix, rows, v.float(), k, sign)
    largest = v.abs().amax()
    return found, outside.double() - torch.where(largest > 0, 2.0**-22 * (sizes + largest), 0.0)


def _checked(
    factors: Factors,
    v: Tensor,
    indices: tuple[Tensor | None, Tensor | Sequence[Tensor | None] | None],
    precision: RowPrecision,
    backend: Backend | None,
) -> tuple[RowArguments, str]:
    """(arguments with k = 1, backend), or an error that names what does not fit."""
    check_choice("precision", precision, RowPrecision)
    a, b, rows, contractions, (_, m), chosen = check_factors(factors, *indices, backend)
    if precision == "bf16" and chosen == "triton":
        raise ValueError(
            f"precision: 'bf16' is of backend 'cpu', got {chosen!r}, which takes {get_args(Precision)}"
        )
    if precision == "bf16" and chosen == "cpu" and a[0].dtype == torch.float64:
        raise ValueError("precision: 'bf16' takes factors of at most float32, got torch.float64")
    check_duals(v, m, a[0].device)
    return RowArguments(a, b, v, 1, rows, contractions, precision), chosen


# The two signatures repeat their common options, so that editors and type checkers show each one in full.
def row_topk(
    factors: Factors,
    v: Tensor,
    k: int,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: RowPrecision = "ieee",
    sizes: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, per row, the k columns of smallest ``c_ij - v_j`` with ``c = -gain(factors)``, and a bound on the others.

    The n x m matrix is never stored. Listed entries that are not above the bound are the row's smallest, in order.
    Every entry that is not listed is at least the bound, rounding included.

    Example:
        >>> from fastmatch_kernels.ops import row_topk
        >>> a, b = torch.eye(3), 2 * torch.eye(3)
        >>> columns, costs, bound = row_topk([(a, b)], torch.zeros(3), k=1)
        >>> columns.flatten().tolist(), costs.flatten().tolist()
        ([0, 1, 2], [-2.0, -2.0, -2.0])
        >>> bool((bound <= 0).all())
        True

    Args:
        factors: as for :func:`gain`.
        v: (m',) column duals; -inf keeps a column out of every list.
        k: entries per row, at least 0.
        b_index: as for :func:`gain`.
        contraction_index: as for :func:`gain`.
        precision: as for :func:`gain`, or "bf16" on "cpu" for factors up to float32: one product of factors rounded to
            bfloat16, each entry lowered by a bound on the rounding. Costs are then at most the true ones (up to
            float32's rounding) and the bound is as valid as ever. It needs bfloat16 matrix units to be fast.
        sizes: (n,) float64, ``sum_k |a_ik| max_j |b_jk|`` or more, if the caller knows it. The bound needs it, and
            computing it reads the factors once more. Not used at "bf16".
        tile: rows and columns computed at a time on "cpu"; the other backends choose their own.
        backend: as for :func:`gain`.

    Returns:
        (indices (n, k) int64, costs c (n, k), bound (n,)), the last two float32 (float64 for float64 factors); -1 and
        +inf if a row has fewer than k entries.

    Raises:
        TypeError: factors or an index of a wrong dtype.
        ValueError: shapes, entries of an index, devices or options that do not fit.
    """
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    arguments, chosen = _checked(factors, v, (b_index, contraction_index), precision, backend)
    n = len(arguments.a[0])
    if sizes is not None and (
        sizes.shape != (n,) or sizes.dtype != torch.float64 or sizes.device != v.device
    ):
        raise ValueError(
            f"sizes: expected {n} float64 numbers on {v.device}, "
            f"got {tuple(sizes.shape)} of {sizes.dtype} on {sizes.device}"
        )
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile: expected (rows, columns), both at least 1, got {tile}")
    return _row_topk(arguments._replace(k=k, sizes=sizes, tile=tile or ()), chosen)


# Repeats options of :func:`row_topk`, for the reason given there.
def row_min(
    factors: Factors,
    v: Tensor,
    *,
    b_index: Tensor | None = None,
    contraction_index: Tensor | Sequence[Tensor | None] | None = None,
    precision: RowPrecision = "ieee",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return, per row, the smallest ``c_ij - v_j`` with ``c = -gain(factors)``, and its column.

    The n x m matrix is never stored. Arguments and errors are those of :func:`row_topk`.

    Example:
        >>> from fastmatch_kernels.ops import row_min
        >>> value, column = row_min([(torch.eye(3), 2 * torch.eye(3))], torch.zeros(3))
        >>> value.tolist(), column.tolist()
        ([-2.0, -2.0, -2.0], [0, 1, 2])

    Returns:
        (values (n,) float32 (float64 for float64 factors), columns (n,) int64); +inf and -1 for a row without entries.
    """
    return _row_min(*_checked(factors, v, (b_index, contraction_index), precision, backend))
