"""Bytes, operations and the time that they take at least, on paper: nothing here is measured.

``max(bytes / bandwidth, FLOP / rate)`` at the published peaks of a target. Real kernels reach a part of it;
the figure is for comparing with a measurement and for seeing which of the two limits.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmatch_kernels._triton.tiles import Target, ceil_div, matmul_tiles
from fastmatch_kernels.moments.triton import CHUNK
from fastmatch_kernels.row_topk.triton import few_of

__all__ = ["Work", "channel_affine", "cost_rows", "gain", "moments", "permute_merge", "row_softmin"]


@dataclass(frozen=True)
class Work:
    """What one call moves and computes.

    Attributes:
        bytes: to and from memory, each operand once.
        flops: of the product, at the rate of its precision.
        picks: operations on the ordinary units beside it, at the IEEE float32 rate; not overlapped.
    """

    bytes: int
    flops: int = 0
    picks: int = 0

    def seconds(self, target: Target, precision: str) -> float:
        """The least time on ``target``."""
        product = self.flops / target.rates[precision]
        return max(self.bytes / target.bandwidth, product) + self.picks / target.rates["ieee"]

    def limit(self, target: Target, precision: str) -> str:
        """Which of the two it is."""
        memory = self.bytes / target.bandwidth
        return "memory" if memory > self.flops / target.rates[precision] else "compute"


def gain(n: int, m: int, d: int, size: int = 4) -> Work:
    """``G = A B^T``: 2 n m d operations; factors read, G written once."""
    return Work((n * d + m * d) * size + 4 * n * m, 2 * n * m * d)


def cost_rows(n: int, m: int, d: int, k: int, precision: str, target: Target, size: int = 4) -> Work:
    """Products as :func:`gain`, no matrix written, candidates written and read; four operations a pick."""
    tiles_n = ceil_div(m, matmul_tiles(n, m, precision, target, "reduced").columns)
    few = few_of(k, tiles_n)
    candidates = n * tiles_n * (8 * few + 4)
    return Work((n * d + m * d) * size + 2 * candidates + 12 * n * k, 2 * n * m * d, 4 * few * n * m)


def row_softmin(n: int, m: int, d: int, precision: str, target: Target, size: int = 4) -> Work:
    """Products as :func:`gain`; one number per row and tile; a minimum, an exponential and a sum an entry."""
    parts = ceil_div(m, matmul_tiles(n, m, precision, target, "reduced").columns)
    return Work((n * d + m * d) * size + 8 * n * parts, 2 * n * m * d, 8 * n * m)


def moments(samples: int, channels_a: int, channels_b: int, size: int = 4) -> Work:
    """Activations read once, float64 accumulators read and written once a chunk."""
    chunks = ceil_div(samples, CHUNK)
    accumulators = 16 * chunks * channels_a * channels_b
    return Work(
        samples * (channels_a + channels_b) * size + accumulators, 2 * samples * channels_a * channels_b
    )


def permute_merge(numel: int, weights: int, size: int = 4) -> Work:
    """Each weight read, the result written once."""
    return Work((weights + 1) * numel * size)


def channel_affine(numel: int, size: int = 4) -> Work:
    """One read, one write."""
    return Work(2 * numel * size)
