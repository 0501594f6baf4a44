"""The checks of operations on factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import Backend, backend_of, beside, check_floating, check_range

__all__ = ["Factors", "check_duals", "check_factors", "result_dtype"]

Factors: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def check_factors(
    factors: Factors,
    b_index: Tensor | None,
    contraction_index: Tensor | Sequence[Tensor | None] | None,
    backend: Backend | None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor | None], tuple[int, int], str]:
    """Return (A's, B's, index of B's rows, contraction index of each pair, (n, m), backend).

    Indices come back on the factors' device.

    Raises:
        TypeError, ValueError: something does not fit; the message names it.
    """
    if not factors:
        raise ValueError("factors: expected at least one pair")
    a, b = [pair[0] for pair in factors], [pair[1] for pair in factors]
    for k, pair in enumerate(factors):
        for x in pair:
            check_floating(f"factors[{k}]", x)
        if any(x.ndim != 2 for x in pair) or a[k].shape[1] != b[k].shape[1]:
            raise ValueError(
                f"factors[{k}]: expected (n, d) and (m, d), got {tuple(a[k].shape)} and {tuple(b[k].shape)}"
            )
        if len(a[k]) != len(a[0]) or len(b[k]) != len(b[0]):
            raise ValueError(
                f"factors[{k}]: expected {len(a[0])} and {len(b[0])} rows as factors[0], "
                f"got {len(a[k])} and {len(b[k])}"
            )
        if a[k].dtype != a[0].dtype or b[k].dtype != a[0].dtype:
            raise TypeError(f"factors[{k}]: expected {a[0].dtype}, got {a[k].dtype} and {b[k].dtype}")
    if contraction_index is None or isinstance(contraction_index, Tensor):
        contractions: list[Tensor | None] = [contraction_index] * len(factors)
    else:
        contractions = list(contraction_index)
    given_order = list(contractions)
    if len(contractions) != len(factors):
        raise ValueError(f"contraction_index: expected {len(factors)}, one per pair, got {len(contractions)}")
    for k, index in enumerate(contractions):
        # An index that several pairs share is checked, and brought to their device, once.
        if index is not None and not (k and index is contractions[0] and b[k].shape[1] == b[0].shape[1]):
            depth = b[k].shape[1]
            _check_gather(f"contraction_index[{k}]", index, depth, depth)
    m = len(b[0])
    if b_index is not None:
        _check_gather("b_index", b_index, None, m)
        m = len(b_index)
    rows = beside(b_index, a[0])
    for k, index in enumerate(contractions):
        # Compared by identity, not by id: torch 2.11 does not compile that.
        shared = next((i for i in range(k) if index is given_order[i]), None)
        contractions[k] = beside(index, a[0]) if shared is None else contractions[shared]
    given = [x for x in (rows, *contractions) if x is not None]
    return a, b, rows, contractions, (len(a[0]), m), backend_of(*a, *b, *given, backend=backend)


def result_dtype(factor: Tensor) -> torch.dtype:
    """Return float64 for float64 factors, else float32."""
    return torch.float64 if factor.dtype == torch.float64 else torch.float32


def _check_gather(name: str, index: Tensor, length: int | None, size: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if index.ndim != 1 or (length is not None and len(index) != length):
        raise ValueError(f"{name}: expected {length or 'a vector of'} entries, got {tuple(index.shape)}")
    check_range(name, index, size)


def check_duals(v: Tensor, m: int, device: torch.device) -> None:
    """Raise ValueError for column duals that do not fit."""
    if v.shape != (m,) or not v.is_floating_point() or v.device != device:
        raise ValueError(
            f"v: expected {m} floating point numbers on {device}, got {tuple(v.shape)} of {v.dtype} on {v.device}"
        )
