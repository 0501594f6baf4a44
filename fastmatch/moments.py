"""Streaming statistics of activations: per-channel moments, and cross products between two models.

All sums are pooled over every sample exactly as if the data had come in one batch: per batch in the
data's precision around a shift, across batches in float64 (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["SIMILARITIES", "ChannelMoments", "CrossMoments"]

SIMILARITIES = ("correlation", "covariance", "inner")


@dataclass
class ChannelMoments:
    """Mean and variance per channel, merged over batches.

    Attributes:
        count: samples seen (batch times positions).
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared deviations from the mean.
    """

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    m2: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def update(self, values: torch.Tensor, dim: int = 1) -> None:
        """Adds a batch whose channels lie along ``dim``; every other dimension is samples."""
        values = values.detach()
        if not values.is_floating_point():
            raise TypeError(f"values: expected floating point activations, got {values.dtype}")
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        channels = values.shape[dim]
        count = values.numel() // max(channels, 1)
        if count == 0:
            return
        others = [d for d in range(values.ndim) if d != dim % values.ndim]
        var, mean = torch.var_mean(values, dim=others, correction=0)
        self.merge(ChannelMoments(count, mean.double(), var.double() * count))

    def merge(self, other: ChannelMoments) -> None:
        """Adds what another has seen, as if the samples had come here."""
        if self.count == 0:
            self.count, self.mean, self.m2 = other.count, other.mean, other.m2
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """(C,) float64, population variance (divided by the count)."""
        return self.m2 / max(self.count, 1)

    def permuted(self, index: torch.Tensor) -> ChannelMoments:
        """The statistics of the same layer after its channels are selected by ``index``."""
        index = index.to(self.mean.device)
        return ChannelMoments(self.count, self.mean[index], self.m2[index])


@dataclass
class CrossMoments:
    """Second moments between the activations of two models, over rows that belong together.

    Sums are kept around a shift, the mean of the first batch: ``sum (a - s_a)(b - s_b)^T``, with products
    in the activations' precision (float32 at least) and sums over batches in float64.

    Memory: n x n float64.
    """

    count: int = 0
    _shift: tuple[torch.Tensor, ...] = ()
    _sums: list[torch.Tensor] = field(default_factory=list)
    _squares: list[torch.Tensor] = field(default_factory=list)
    _cross: torch.Tensor | None = None

    ROWS = 4096
    """Rows per product: float32 rounding inside one product stays that of so many terms."""

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds rows: ``a`` of shape (samples, n), ``b`` of shape (samples, m), the same samples."""
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
            raise ValueError(f"a, b: expected two matrices of equally many rows, got {a.shape} and {b.shape}")
        if a.shape[0] == 0:
            return
        a, b = (x if x.dtype == torch.float64 else x.float() for x in (a, b))
        b = b.to(a.device)
        if self._cross is None:
            self._shift = (a.mean(dim=0), b.mean(dim=0))
            zeros = {"dtype": torch.float64, "device": a.device}
            self._sums = [torch.zeros(x.shape[1], **zeros) for x in (a, b)]
            self._squares = [torch.zeros(x.shape[1], **zeros) for x in (a, b)]
            self._cross = torch.zeros(a.shape[1], b.shape[1], **zeros)
        for start in range(0, a.shape[0], self.ROWS):
            parts = [x[start : start + self.ROWS] - s for x, s in zip((a, b), self._shift, strict=True)]
            for k, part in enumerate(parts):
                self._sums[k] += part.sum(dim=0)
                self._squares[k] += torch.linalg.vecdot(part, part, dim=0)
            self._cross += parts[0].T @ parts[1]
        self.count += a.shape[0]

    def _require(self) -> torch.Tensor:
        if self._cross is None:
            raise ValueError("moments: no sample was read")
        return self._cross

    @property
    def mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of A's and B's channels, float64."""
        self._require()
        first, second = (s.double() + t / self.count for s, t in zip(self._shift, self._sums, strict=True))
        return first, second

    @property
    def variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Population variances of A's and B's channels, float64."""
        self._require()
        first, second = (
            ((q - t.square() / self.count) / self.count).clamp_(min=0)
            for q, t in zip(self._squares, self._sums, strict=True)
        )
        return first, second

    def similarity(self, kind: str = "correlation") -> torch.Tensor:
        """(n, m) float64: Pearson ``"correlation"``, ``"covariance"``, or plain ``"inner"`` product per sample.

        A channel without variance (a dead unit) has correlation 0 with everything.
        """
        cross = self._require()
        if kind not in SIMILARITIES:
            raise ValueError(f"similarity: expected one of {SIMILARITIES}, got {kind!r}")
        if kind == "inner":
            mean_a, mean_b = self.mean
            covariance = self.similarity("covariance")
            return covariance.addr_(mean_a, mean_b)
        covariance = torch.addr(cross, self._sums[0], self._sums[1], alpha=-1.0 / self.count)
        covariance /= self.count
        if kind == "covariance":
            return covariance
        for dim, (variance, mean) in enumerate(zip(self.variance, self.mean, strict=True)):
            # Below float32 rounding of the mean, a spread is noise of the summation, not a signal.
            alive = variance > (1e-6 * mean).square()
            scale = torch.where(alive, variance.clamp(min=1e-300).rsqrt(), 0.0)
            covariance *= scale[:, None] if dim == 0 else scale[None, :]
        return covariance
