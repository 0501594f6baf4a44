"""Permute and merge weights in one pass: ``permute_merge``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import Backend, Operation, backend_of, beside, check_floating, check_range
from fastmatch_kernels.permute_merge.reference import MergeArguments

__all__ = ["permute_merge"]

_permute_merge = Operation("permute_merge", MergeArguments, lambda arguments: None, mutates=("out",))


def permute_merge(
    weights: Sequence[Tensor],
    alphas: Sequence[float],
    first: Sequence[Tensor | None] | None = None,
    second: Sequence[Tensor | None] | None = None,
    *,
    dims: tuple[int, int] = (0, 1),
    blocks: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return ``sum_k alphas[k] * weights[k]``, each weight reordered on up to two axes, in one read and one write.

    Example:
        >>> from fastmatch_kernels.ops import permute_merge
        >>> a, b = torch.randn(3, 2), torch.randn(3, 2)
        >>> rows, columns = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
        >>> merged = permute_merge([a, b], [0.5, 0.5], [None, rows], [None, columns])
        >>> torch.allclose(merged, 0.5 * a + 0.5 * b[rows][:, columns])
        True

    Args:
        weights: tensors of one shape, dtype and device; float64 not on "triton". Sums are in float32 at least. NaN and
            inf follow arithmetic.
        alphas: one number per weight.
        first: per weight an int64 index for axis ``dims[0]``, or None to leave it; ``new[i] = weight[index[i]]``. It
            has one entry per block and need not be a permutation. Indices may be on the CPU, where checking them costs
            a GPU no wait.
        second: the same for ``dims[1]``.
        dims: two axes in rising order; the second need not exist if no index names it.
        blocks: how many neighbouring elements move together along each axis: 49 for the columns behind a flattened
            512 x 7 x 7 map.
        out: like a weight, written and returned; may be a weight that has no index (merging in place).
        backend: "triton", "cpu" or "reference"; by the tensors' device if None.

    Returns:
        ``out``, or a new tensor like a weight.

    Raises:
        TypeError: weights that are not floating point, or an index that is not int64.
        ValueError: shapes, entries of an index, devices or options that do not fit.
    """
    if not weights:
        raise ValueError("weights: expected at least one")
    head = weights[0]
    for k, weight in enumerate(weights):
        check_floating(f"weights[{k}]", weight)
        if weight.shape != head.shape or weight.dtype != head.dtype:
            raise ValueError(
                f"weights[{k}]: expected {tuple(head.shape)} of {head.dtype} as weights[0], "
                f"got {tuple(weight.shape)} of {weight.dtype}"
            )
    if len(alphas) != len(weights):
        raise ValueError(f"alphas: expected {len(weights)}, one per weight, got {len(alphas)}")
    lists: list[list[Tensor | None]] = []
    for name, given, dim, block in zip(("first", "second"), (first, second), dims, blocks, strict=True):
        indices: list[Tensor | None] = [None] * len(weights) if given is None else list(given)
        if len(indices) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} entries, one per weight, got {len(indices)}")
        for k, index in enumerate(indices):
            if index is not None:
                _check_index(f"{name}[{k}]", index, head.shape, dim, block)
        lists.append([beside(index, head) for index in indices])
    if not 0 <= dims[0] < dims[1] and any(i is not None for i in lists[1]):
        raise ValueError(f"dims: expected two axes in rising order, got {tuple(dims)}")
    chosen = backend_of(*weights, *(i for part in lists for i in part if i is not None), backend=backend)
    if out is None:
        out = torch.empty_like(head, memory_format=torch.contiguous_format)
    elif out.shape != head.shape or out.dtype != head.dtype or out.device != head.device:
        raise ValueError(f"out: expected a tensor like weights[0], got {tuple(out.shape)} of {out.dtype}")
    _check_memory(out, weights, lists)
    _permute_merge(
        MergeArguments(list(weights), list(alphas), lists[0], lists[1], list(dims), list(blocks), out), chosen
    )
    return out


def _check_memory(out: Tensor, weights: Sequence[Tensor], indices: list[list[Tensor | None]]) -> None:
    """Raise ValueError if ``out`` shares memory with a weight that does not stay in place."""
    if torch.compiler.is_compiling() or out.numel() == 0:
        return
    for k, weight in enumerate(weights):
        if weight.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            continue
        same = weight.data_ptr() == out.data_ptr() and weight.stride() == out.stride()
        if not same or any(part[k] is not None for part in indices):
            raise ValueError(f"out: shares memory with weights[{k}], which is reordered or another view")


def _check_index(name: str, index: Tensor, shape: torch.Size, dim: int, block: int) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {index.dtype}")
    if not 0 <= dim < len(shape):
        raise ValueError(f"dims: expected axes of a tensor of shape {tuple(shape)}, got {dim}")
    if block < 1 or shape[dim] % block:
        raise ValueError(f"blocks: expected a divisor of axis {dim} of length {shape[dim]}, got {block}")
    expected = shape[dim] // block
    if index.shape != (expected,):
        raise ValueError(f"{name}: expected {expected} entries for axis {dim}, got {tuple(index.shape)}")
    check_range(name, index, expected)
