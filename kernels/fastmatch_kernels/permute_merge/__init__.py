"""The entry of ``permute_merge``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmatch_kernels._dispatch import backend_of, check_floating, check_range, is_plain, module_of

__all__ = ["permute_merge"]


@torch.library.custom_op("fastmatch::permute_merge", mutates_args=("out",))
def _permute_merge(
    weights: Sequence[Tensor],
    alphas: Sequence[float],
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    dims: Sequence[int],
    blocks: Sequence[int],
    out: Tensor,
    backend: str,
) -> None:
    module_of(backend, "permute_merge").permute_merge(
        list(weights), list(alphas), list(first), list(second), list(dims), list(blocks), out
    )


@_permute_merge.register_fake
def _(weights, alphas, first, second, dims, blocks, out, backend) -> None:
    return None


def permute_merge(
    weights: Sequence[Tensor],
    alphas: Sequence[float],
    first: Sequence[Tensor | None] | None = None,
    second: Sequence[Tensor | None] | None = None,
    *,
    dims: tuple[int, int] = (0, 1),
    blocks: tuple[int, int] = (1, 1),
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_k alphas[k] * weights[k]``, each weight reordered on up to two axes, in one read and one write.

    Example:
        >>> merged = permute_merge([w_a, w_b], [0.5, 0.5], [None, rows_of_b], [None, columns_of_b])
        >>> aligned = permute_merge([w_b], [1.0], [rows_of_b])

    Args:
        weights: tensors of one shape, dtype and device; float64 not on "triton". Sums run in float32 at
            least, and the result has the weights' dtype. NaN and inf follow arithmetic.
        alphas: one number a weight.
        first: per weight an index (int64) for ``dims[0]``, or None where it stays; ``new[i] = w[index[i]]``.
            Need not be a permutation, but has one entry per block.
        second: the same for ``dims[1]``.
        dims: two different axes in rising order; of the second only if an index names it.
        blocks: how many neighbouring elements move together along each: 49 for the columns behind a
            flattened 512 x 7 x 7 map.
        out: written and returned; may be one of the weights that has no index (merging in place).
        backend: see :func:`backend_of`.

    Raises:
        ValueError: shapes, indices or options that do not fit.
        TypeError: weights that are not floating point, or an index that is not int64.
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
        raise ValueError(f"alphas: expected {len(weights)}, one a weight, got {len(alphas)}")
    lists: list[list[Tensor | None]] = []
    for name, given, dim, block in zip(("first", "second"), (first, second), dims, blocks, strict=True):
        indices: list[Tensor | None] = [None] * len(weights) if given is None else list(given)
        if len(indices) != len(weights):
            raise ValueError(f"{name}: expected {len(weights)} entries, one a weight, got {len(indices)}")
        for k, index in enumerate(indices):
            if index is not None:
                _check_index(f"{name}[{k}]", index, head.shape, dim, block)
        lists.append(indices)
    if not 0 <= dims[0] < dims[1] and any(i is not None for i in lists[1]):
        raise ValueError(f"dims: expected two axes in rising order, got {tuple(dims)}")
    chosen = backend_of(*weights, *(i for part in lists for i in part if i is not None), backend=backend)
    if out is None:
        out = torch.empty_like(head, memory_format=torch.contiguous_format)
    elif out.shape != head.shape or out.dtype != head.dtype or out.device != head.device:
        raise ValueError(f"out: expected a tensor like weights[0], got {tuple(out.shape)} of {out.dtype}")
    arguments = (list(weights), list(alphas), lists[0], lists[1], list(dims), list(blocks), out)
    shares = not torch.compiler.is_compiling() and _shares_memory(out, weights, lists)
    # torch.library knows no output that is also an input; under torch.compile this is never eager.
    if shares or is_plain(*weights, out):
        module_of(chosen, "permute_merge").permute_merge(*arguments)
        return out
    _permute_merge(*arguments, chosen)
    return out


def _shares_memory(out: Tensor, weights: Sequence[Tensor], indices: list[list[Tensor | None]]) -> bool:
    """Whether ``out`` is one of the weights, which must then stay in place."""
    found = False
    for k, weight in enumerate(weights):
        if out.numel() == 0 or weight.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
            continue
        same = weight.data_ptr() == out.data_ptr() and weight.stride() == out.stride()
        if not same or any(part[k] is not None for part in indices):
            raise ValueError(f"out: shares memory with weights[{k}], which is reordered or another view")
        found = True
    return found


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
