"""One pass over two checkpoints, before they are matched: are the values finite, what is their hash, what are their sums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from fastmatch._internal.concurrent import both
from fastmatch._internal.ranks import Ranks, deal
from fastmatch._internal.states import check_finite
from fastmatch.checkpoint.names import Layout
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.matching.objective import Survey
from fastmatch_kernels.inner_product import squares_and_inner

__all__ = ["Surveyed", "survey"]

COMPILED_FROM = 1 << 28
"""Numbers in both files whose sums take longer in torch than a kernel takes to compile."""


@dataclass(frozen=True)
class Surveyed:
    """What one pass over A and B has found.

    Attributes:
        digests: hashes of every name, shape, type and value of A and of B.
        sums: name in the files -> ``<a, a>``, ``<b, b>`` and ``<a, b>``, for floating point tensors that both have.
    """

    digests: tuple[str, str]
    sums: Mapping[str, tuple[float, float, float]]

    def of(self, layout: Layout) -> Survey:
        """Return the sums by parameter."""
        parts: dict[str, list[tuple[float, float, float]]] = {}
        lacking = set()
        for name, chunk in layout.items():
            if name in self.sums:
                parts.setdefault(chunk.parameter, []).append(self.sums[name])
            else:
                lacking.add(chunk.parameter)
        return {
            parameter: (math.fsum(x for x, _, _ in found), math.fsum(y for _, y, _ in found), math.fsum(z for _, _, z in found))
            for parameter, found in parts.items()
            if parameter not in lacking
        }  # fmt: skip


def survey(a: Checkpoint, b: Checkpoint, ranks: Ranks) -> Surveyed:
    """Read every tensor of A and B once. A and B are read at the same time, on two cores.

    Args:
        a, b: the checkpoints.
        ranks: the processes that share the reading.

    Raises:
        ValueError: a tensor holds NaN or infinity, or cannot be read.
    """
    names = sorted({*a, *b})
    sizes = [sum(c.headers[name].numel() for c in (a, b) if name in c) for name in names]
    compiled = sum(sizes) > COMPILED_FROM
    tasks = [partial(_of_tensor, a, b, name, compiled) for name in names]
    found = ranks.share(tasks, deal(sizes, ranks.size), f"the tensors of {a.path.name} and {b.path.name}")
    rows = list(zip(names, found, strict=True))
    first = _hash_of_all([(name, mark) for name, (mark, _, _) in rows if mark])
    second = _hash_of_all([(name, mark) for name, (_, mark, _) in rows if mark])
    return Surveyed((first, second), {name: sums for name, (_, _, sums) in rows if sums is not None})


def _of_tensor(
    a: Checkpoint, b: Checkpoint, name: str, compiled: bool
) -> tuple[str, str, tuple[float, float, float] | None]:
    """The hashes of A's and B's tensor, where there is one, and their sums."""
    (first, x), (second, y) = both(partial(_read, a, name), partial(_read, b, name))
    if x is None or y is None or x.shape != y.shape or not (x.is_floating_point() and y.is_floating_point()):
        for checkpoint, tensor in ((a, x), (b, y)):
            if tensor is not None:
                check_finite({name: tensor}, str(checkpoint.path))
        return first, second, None
    sums = squares_and_inner(x, y, compiled=compiled)
    for checkpoint, tensor, square in ((a, x, sums[0]), (b, y, sums[1])):
        if not math.isfinite(square):  # of float64, squares may overflow
            check_finite({name: tensor}, str(checkpoint.path))
    return first, second, sums


def _read(checkpoint: Checkpoint, name: str) -> tuple[str, torch.Tensor | None]:
    if name not in checkpoint:
        return "", None
    tensor = checkpoint.on_host(name)
    return _hash_of(tensor), tensor


def _hash_of(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's shape, type and values."""
    total = hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
    if tensor.numel():
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _hash_of_all(found: list[tuple[str, str]]) -> str:
    """Return one hash of all tensors' names and hashes."""
    return hashlib.sha256(repr(found).encode()).hexdigest()
