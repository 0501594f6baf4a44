"""Streaming statistics of activations: per-channel moments, and cross products between two models.

All sums are pooled over samples as if the data had come in one batch: within a batch in the data's precision around a
shift, across batches in float64 (Chan, Golub and LeVeque 1983). The kernels compute the sums of a batch; this module
turns them into the statistics that matching and renormalization use.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch

from fastmatch._internal.checks import check_choice
from fastmatch_kernels import ops as kernels
from fastmatch_kernels._dispatch import Backend
from fastmatch_kernels.moments.reference import Moments

__all__ = ["ChannelMoments", "CrossMoments", "PooledSimilarity"]

PooledSimilarity: TypeAlias = Literal["correlation", "covariance", "inner"]
"""The similarities that :class:`CrossMoments` computes."""


PRECISION = "fp16x3"
"""Of products on a GPU: about float32's own, on matrix units. On the CPU they are float32."""


@dataclass(eq=False)
class ChannelMoments:
    """Mean and variance per channel, merged over batches.

    Attributes:
        count: samples seen (batch times positions).
        mean: (C,) float64.
        m2: (C,) float64, the sum of squared deviations from the mean.
    """

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    m2: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))

    def update(self, values: torch.Tensor, dim: int = 1) -> None:
        """Add a batch whose channels are along ``dim``; all other dimensions are samples."""
        if not values.is_floating_point():
            raise TypeError(f"values: expected floating point activations, got {values.dtype}")
        if values.numel() == 0:
            return
        batch = kernels.moments(values, dim=dim, backend=_backend(values))
        self.merge(ChannelMoments(batch.count, batch.mean(), batch.variance() * batch.count))

    def merge(self, other: ChannelMoments) -> None:
        """Add the samples that another one has seen."""
        if self.count == 0:
            self.count, self.mean, self.m2 = other.count, other.mean, other.m2
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total

    def to(self, device: torch.device | str) -> ChannelMoments:
        """Return the moments on a device."""
        return ChannelMoments(self.count, self.mean.to(device), self.m2.to(device))

    @property
    def variance(self) -> torch.Tensor:
        """(C,) float64, population variance (divided by the count)."""
        return self.m2 / max(self.count, 1)

    def permuted(self, index: torch.Tensor) -> ChannelMoments:
        """Return the statistics of the layer after its channels are selected by ``index``."""
        index = index.to(self.mean.device)
        return ChannelMoments(self.count, self.mean[index], self.m2[index])


@dataclass(eq=False)
class CrossMoments:
    """Second moments between the activations of two models on the same samples.

    Sums are taken around a shift, in the activations' precision (float32 or wider) within a batch and in float64 across
    batches.

    Memory: n x n float64, and small batches until they have 4096 rows.
    """

    state: Moments | None = None

    def update(self, a: torch.Tensor, b: torch.Tensor, dim: int = 1) -> None:
        """Add the same samples of both: channels along ``dim``, all other dimensions samples, in any strides."""
        if a.ndim < 2 or [*a.movedim(dim, -1).shape[:-1]] != [*b.movedim(dim, -1).shape[:-1]]:
            raise ValueError(
                f"a, b: expected equally many rows, dimension {dim} aside, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.numel() == 0:
            return
        a, b = (x if x.is_floating_point() else x.float() for x in (a, b.to(a.device)))
        self.state = kernels.moments(
            a, b, dim=dim, state=self.state, precision=PRECISION, backend=_backend(a, b)
        )

    def merge(self, other: CrossMoments) -> CrossMoments:
        """Add the samples that another one has seen, and return this one."""
        if self.state is None or other.state is None:
            self.state = self.state or other.state
        else:
            self.state = self.state.merge(other.state)
        return self

    def on_host(self) -> CrossMoments:
        """Return the moments with nothing pending, in the host's memory."""
        if self.state is None:
            return self
        state = self.state.settle()
        return CrossMoments(
            replace(
                state,
                shifts=tuple(x.cpu() for x in state.shifts),
                stats=tuple(x.cpu() for x in state.stats),
                cross={name: x.cpu() for name, x in state.cross.items()},
                add=None,
            )
        )

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return 0 if self.state is None else self.state.count

    def _require(self) -> Moments:
        if self.state is None:
            raise ValueError("moments: no sample was read")
        return self.state

    @property
    def mean(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The means of A's and B's channels, float64."""
        return self._require().mean(0), self._require().mean(1)

    @property
    def variance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The population variances of A's and B's channels, float64."""
        return self._require().variance(0), self._require().variance(1)

    def similarity(self, kind: PooledSimilarity = "correlation") -> torch.Tensor:
        """Return the (n, m) float64 Pearson ``"correlation"``, ``"covariance"`` or mean ``"inner"`` product.

        A channel without variance (a dead unit) has correlation 0 with every other.
        """
        state = self._require()
        check_choice("similarity", kind, PooledSimilarity)
        return {"correlation": state.correlation, "covariance": state.covariance, "inner": state.inner}[
            kind
        ]()


def _backend(*activations: torch.Tensor) -> Backend | None:
    """The backend: the device's kernels if there are any for these activations, else the reference in float64."""
    on_gpu = all(x.device.type == "cuda" and x.dtype != torch.float64 for x in activations)
    return None if on_gpu or activations[0].device.type == "cpu" else "reference"
