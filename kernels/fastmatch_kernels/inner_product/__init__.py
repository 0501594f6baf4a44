"""Inner products of a tensor with a reordered one, in float64: ``inner`` and ``change_of_inner``; sums of two tensors or of rows.

A reordering maps dimensions to int64 positions, ``{dim: index}``: ``b.index_select(dim, index)`` along each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import backend_of
from fastmatch_kernels.inner_product import reference

__all__ = [
    "InnerSum",
    "change_of_inner",
    "inner",
    "moved_positions",
    "row_products",
    "row_squares",
    "squares_and_inner",
]

COMPILED = (torch.float32, torch.float64)
"""Dtypes that the CPU kernels read, in any pair; others go through the reference."""

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes that the CPU kernels read too, if both tensors have the same one."""

ON_GPU = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that the GPU kernel reads, and that of sums on the CPU."""

SMALL = 1 << 18
"""Numbers up to which a tensor on the CPU goes through torch. That takes a fraction of a millisecond longer than the
kernel, which a process takes a tenth of a second to load and more than a second to compile."""

CAST = 1 << 22
"""Numbers that are cast at a time, of two tensors of other dtypes."""

Indices = Mapping[int, Tensor]
"""Dimension -> int64 positions to select."""


class InnerSum:
    """A sum of inner products in float64, for which the host waits for a GPU once, at the end.

    Terms are added one after the other, in the order in which they came, wherever they were computed. So the sum has the same
    bits if its terms come as numbers from other processes.

    Example:
        >>> from fastmatch_kernels.inner_product import InnerSum
        >>> total = InnerSum()
        >>> total.add(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), {})
        >>> total.value()
        6.0
    """

    def __init__(self) -> None:
        self._terms: list[float | Tensor] = []

    def add(self, a: Tensor, b: Tensor, indices: Indices) -> None:
        """Add ``<a, b reordered by indices>``; see :func:`inner`."""
        self._terms.append(_inner(a, b, indices))

    def add_change(self, a: Tensor, b: Tensor, now: Indices, then: Indices) -> None:
        """Add what :func:`change_of_inner` returns."""
        self._terms += _changes(a, b, now, then)

    def add_number(self, number: float | Tensor) -> None:
        """Add a number, or a scalar that may be on a GPU."""
        self._terms.append(number)

    def terms(self) -> list[float]:
        """Return the terms, which another process may add."""
        for device in {term.device for term in self._terms if isinstance(term, Tensor)}:
            places = [k for k, x in enumerate(self._terms) if isinstance(x, Tensor) and x.device == device]
            numbers = torch.stack([torch.as_tensor(self._terms[k]).double() for k in places]).cpu().tolist()
            for k, number in zip(places, numbers, strict=True):
                self._terms[k] = number
        return [float(term) for term in self._terms]

    def value(self) -> float:
        """Return the sum."""
        total = 0.0
        for term in self.terms():
            total += term  # sum() adds otherwise in some versions of Python
        self._terms = [total]
        return total


def inner(a: Tensor, b: Tensor, indices: Indices) -> float:
    """Return ``<a, b reordered by indices>``, summed in float64, without a reordered copy of ``b``.

    Example:
        >>> from fastmatch_kernels.inner_product import inner
        >>> a, b = torch.randn(3, 4), torch.randn(3, 4)
        >>> rows = torch.tensor([2, 0, 1])
        >>> abs(inner(a, b, {0: rows}) - float((a.double() * b[rows].double()).sum())) < 1e-12
        True

    Args:
        a: floating point tensor.
        b: of a's shape; devices and dtypes may differ.
        indices: dimension -> int64 positions of ``b``.
    """
    return float(_inner(a, b, indices))


def change_of_inner(a: Tensor, b: Tensor, now: Indices, then: Indices) -> float:
    """Return ``inner(a, b, now) - inner(a, b, then)`` from the positions that differ alone.

    The error is float64's rounding of the difference, not of the two inner products.

    Example:
        >>> from fastmatch_kernels.inner_product import change_of_inner
        >>> a, b = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 7.0, 5.0])
        >>> change_of_inner(a, b, {0: torch.tensor([1, 0, 2])}, {})
        -4.0

    Args:
        a: floating point tensor.
        b: of a's shape; devices and dtypes may differ.
        now: dimension -> int64 positions of ``b``.
        then: the same for the second inner product.
    """
    return float(sum(_changes(a, b, now, then)))


def squares_and_inner(a: Tensor, b: Tensor, *, compiled: bool = True) -> tuple[float, float, float]:
    """Return ``<a, a>``, ``<b, b>`` and ``<a, b>``, summed in float64.

    Example:
        >>> from fastmatch_kernels.inner_product import squares_and_inner
        >>> squares_and_inner(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]))
        (5.0, 9.0, 3.0)

    Args:
        a, b: floating point tensors of one shape on the CPU.
        compiled: whether large tensors may go through the kernel, which is far faster and has to be compiled first.
    """
    large = compiled and a.numel() > SMALL and a.dtype == b.dtype and a.dtype in ON_GPU
    if large and a.device.type == b.device.type == "cpu":
        from fastmatch_kernels.inner_product import cpu

        return cpu.squares_and_inner(a, b)
    return reference.squares_and_inner(a, b)


def row_products(a: Tensor, b: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return (r,) float64 ``<a[rows[i]], b[cols[i]]>``.

    Example:
        >>> from fastmatch_kernels.inner_product import row_products
        >>> a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 5.0]])
        >>> row_products(a, b, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).tolist()
        [3.0, 7.0, 20.0]

    Args:
        a, b: (n, d) and (m, d) on the CPU.
        rows, cols: (r,) int64, of a's and of b's rows; they are not checked.
    """
    work = len(rows) * a.shape[1]
    if _has_row_kernel(a, b, work):
        from fastmatch_kernels.inner_product import cpu

        return cpu.row_products(a, b, rows, cols)
    if a.dtype != b.dtype and work > SMALL:
        wide = torch.promote_types(a.dtype, b.dtype)
        step = max(1, CAST // max(len(a), len(b)))
        parts = zip(a.split(step, 1), b.split(step, 1), strict=True)
        sums = [row_products(_packed(x.to(wide)), _packed(y.to(wide)), rows, cols) for x, y in parts]
        return torch.stack(sums).sum(0)
    return reference.row_products(a, b, rows, cols)


def row_squares(a: Tensor) -> Tensor:
    """Return (n,) float64 ``<a[i], a[i]>``.

    Example:
        >>> from fastmatch_kernels.inner_product import row_squares
        >>> row_squares(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [5.0, 25.0]

    Args:
        a: (n, d) on the CPU.
    """
    a = _packed(a)
    if _has_row_kernel(a, a, a.numel()):
        from fastmatch_kernels.inner_product import cpu

        return cpu.row_squares(a)
    return reference.row_squares(a)


def _packed(a: Tensor) -> Tensor:
    """Return a matrix whose rows or columns are stored one after the other."""
    return a if a.T.is_contiguous() else a.contiguous()


def _has_row_kernel(a: Tensor, b: Tensor, work: int) -> bool:
    """Whether the kernels of rows read both matrices, and the numbers are so many that these pay."""
    read = a.dtype == b.dtype and a.dtype in (*COMPILED, *HALVES)
    return (
        read
        and work > SMALL
        and any(x.is_contiguous() and y.is_contiguous() for x, y in ((a, b), (a.T, b.T)))
    )


def _inner(a: Tensor, b: Tensor, indices: Indices) -> float | Tensor:
    """The inner product: a number, or a scalar on the GPU."""
    if _has_kernel(a, b, indices):
        from fastmatch_kernels.inner_product import cpu

        return cpu.inner(a, b, {}, indices, None)
    if _is_on_gpu(a, b, indices):
        return _on_gpu(a, b, {}, indices, None)
    return reference.inner(a, b, indices)


def _changes(a: Tensor, b: Tensor, now: Indices, then: Indices) -> list[float | Tensor]:
    """Terms whose sum is the change: numbers, or scalars on the GPU."""
    moved = moved_positions(now, then, a.shape)
    if not moved:
        return []
    dims = now.keys() | then.keys()
    if len(moved) > 1:  # positions that differ along two dimensions are more than a few rows
        if _is_on_gpu(a, b, dims):
            return [_on_gpu(a, b, {}, now, then)]
        return [_inner(a, b, now) - _inner(a, b, then)]
    if _has_kernel(a, b, dims):
        from fastmatch_kernels.inner_product import cpu

        return [cpu.inner(a, b, moved, now, then)]
    if _is_on_gpu(a, b, dims):
        return [_on_gpu(a, b, moved, now, then)]
    return [reference.change_of_inner(a, b, moved, now, then)]


def _is_on_gpu(a: Tensor, b: Tensor, dims: Collection[int]) -> bool:
    alike = a.is_cuda and a.dtype in ON_GPU and b.dtype in ON_GPU and len(dims) <= 2
    return alike and backend_of(a) == "triton"


def _on_gpu(a: Tensor, b: Tensor, moved: Indices, now: Indices, then: Indices | None) -> Tensor:
    from fastmatch_kernels.inner_product import triton

    with torch.cuda.device(a.device):
        return triton.inner(a, b.to(a.device), moved, now, then)


def moved_positions(now: Indices, then: Indices, shape: Sequence[int]) -> dict[int, Tensor]:
    """Return, per dimension, the positions at which two reorderings differ; dimensions where they agree are omitted."""
    moved: dict[int, Tensor] = {}
    for dim in now.keys() | then.keys():
        after, before = now.get(dim), then.get(dim)
        if after is before:
            continue
        every = torch.arange(shape[dim], device="cpu") if after is None or before is None else after
        positions = torch.nonzero(
            (every if after is None else after) != (every if before is None else before)
        )
        if len(positions):
            moved[dim] = positions.flatten()
    return moved


def _has_kernel(a: Tensor, b: Tensor, dims: Collection[int]) -> bool:
    is_read = (a.dtype in COMPILED and b.dtype in COMPILED) or (a.dtype == b.dtype and a.dtype in HALVES)
    is_compiled = is_read and a.numel() > SMALL
    return is_compiled and a.device.type == b.device.type == "cpu" and len(dims) <= 2
