"""What users pass as a matrix, read as numpy arrays that the solvers take."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["as_array", "as_real", "for_kernels"]

EXACT = 1 << 53
"""The largest integer up to which float64 holds all integers."""

EXACT32 = 1 << 24
"""The largest integer up to which float32 does."""

MANY = 1 << 20
"""Integers beyond which it pays to look at all of them: as float32 they are half as many bytes in every pass of a solver."""


def as_array(cost: Any, name: str = "cost") -> np.ndarray:
    """Return the entries as a numpy array, without a copy if there is one already.

    Lists of numbers that numpy has no type for (``Fraction``, ``Decimal``) are converted by ``float``, as scipy does. Integers
    beyond 64 bits stay Python's. Errors call the argument ``name``.

    Raises:
        TypeError: a tensor without entries on a device, or objects that are not numbers.
        ValueError: masked entries, or lists of different lengths.
    """
    if isinstance(cost, torch.Tensor):
        return _from_tensor(cost, name)
    if isinstance(cost, np.ndarray):
        if isinstance(cost, np.ma.MaskedArray) and np.ma.is_masked(cost):
            raise ValueError(f"{name}: has masked entries; fill them, with inf if they are forbidden")
        return np.asarray(cost)
    try:
        array = np.asarray(cost)
    except ValueError as error:
        raise ValueError(f"{name}: expected a matrix of numbers: {error}") from error
    if array.dtype.kind == "O" and all(type(x) is int for x in array.flat):
        return array
    if array.dtype.kind in "OSU":
        try:
            return np.asarray(cost, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected real numbers: {error}") from error
    return array


def _from_tensor(cost: torch.Tensor, name: str) -> np.ndarray:
    if cost.layout != torch.strided or cost.is_nested or cost.is_quantized or cost.is_meta:
        raise TypeError(
            f"{name}: expected a dense tensor with entries, got {cost.dtype}, {cost.layout} on {cost.device}"
        )
    host = cost.detach()
    if host.is_floating_point() and host.dtype not in (torch.float32, torch.float64):
        host = host.float()
    return host.resolve_conj().resolve_neg().cpu().numpy()


def as_real(cost: Any, name: str = "cost") -> np.ndarray:
    """Return the entries as an aligned array of float32 or float64 in this machine's byte order.

    It is copied only if the type or the place in memory demands that.

    Raises:
        TypeError: the entries are not real numbers of at most float64.
        ValueError: integers beyond 2^53; see also :func:`as_array`.
    """
    matrix = as_array(cost, name)
    if not matrix.dtype.isnative:
        matrix = matrix.astype(matrix.dtype.newbyteorder("="))
    if matrix.dtype in (np.float32, np.float64):
        return matrix if matrix.flags.aligned else matrix.copy()
    if np.can_cast(matrix.dtype, np.float32):  # half precision, narrow integers, booleans
        return matrix.astype(np.float32)
    if matrix.dtype.kind in "iu" or (matrix.dtype.kind == "O" and all(type(x) is int for x in matrix.flat)):
        wide = matrix.dtype.itemsize == 8 and matrix.size > 0  # objects are as wide as that
        large = matrix.size > MANY and (wide or _size(matrix[0]) <= EXACT32)
        size = _size(matrix) if wide or large else EXACT
        if wide and size > EXACT:
            raise ValueError(
                f"{name}: integers beyond 2^53 are not exact in float64; pass a matrix of int64 or uint64 to solve, "
                "or subtract a constant"
            )
        return matrix.astype(np.float32 if large and size <= EXACT32 else np.float64)
    raise TypeError(f"{name}: expected real numbers up to float64, got {matrix.dtype}")


def _size(integers: np.ndarray) -> int:
    return max(int(integers.max()), -int(integers.min()))


class _Memory:
    """The memory of an array, described as writeable."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # which owns it
        about = array.__array_interface__
        self.__array_interface__ = {**about, "data": (about["data"][0], False)}


def for_kernels(array: np.ndarray) -> np.ndarray:
    """Return an array under the type that kernels are compiled for; they only read it.

    numba gives arrays that may not be written to a type of their own, for which it would compile every kernel again.
    """
    return array if array.flags.writeable else np.asarray(_Memory(array))
