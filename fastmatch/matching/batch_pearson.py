"""The correlation that published activation matching computes, for comparison with pooled moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BatchPearson"]


@dataclass
class BatchPearson:
    """Pearson correlation from averages over batches (the code of Jordan et al. 2022 and its descendants).

    All batches have the same weight, whatever their length. The standard deviation is the mean of the batches' own
    (corrected) ones, and ``1e-4`` is added to the product of the two. All sums are in float64.
    """

    batches: int = 0
    _mean: tuple[torch.Tensor, ...] = ()
    _std: tuple[torch.Tensor, ...] = ()
    _cross: torch.Tensor | None = None

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add one batch: ``a`` (samples, n) and ``b`` (samples, m) of the same two or more samples."""
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
            raise ValueError(f"a, b: expected two matrices of equally many rows, got {a.shape} and {b.shape}")
        if a.shape[0] < 2:
            raise ValueError(
                "data: similarity 'batch-correlation' takes a standard deviation within each batch, which needs "
                f"two samples; a batch gave {a.shape[0]}"
            )
        pair = a.double(), b.double().to(a.device)
        means = tuple(x.mean(dim=0) for x in pair)
        stds = tuple(x.std(dim=0) for x in pair)
        cross = pair[0].T @ pair[1] / a.shape[0]
        self.batches += 1
        if self._cross is None:
            self._mean, self._std, self._cross = means, stds, cross
            return
        share = 1.0 / self.batches
        self._mean = tuple(torch.lerp(old, new, share) for old, new in zip(self._mean, means, strict=True))
        self._std = tuple(torch.lerp(old, new, share) for old, new in zip(self._std, stds, strict=True))
        self._cross.lerp_(cross, share)

    def merge(self, other: BatchPearson) -> BatchPearson:
        """Add the batches that another one has seen, and return this one."""
        if self._cross is None or other._cross is None:
            return self if other._cross is None else other
        self.batches += other.batches
        share = other.batches / self.batches
        self._mean = tuple(torch.lerp(x, y, share) for x, y in zip(self._mean, other._mean, strict=True))
        self._std = tuple(torch.lerp(x, y, share) for x, y in zip(self._std, other._std, strict=True))
        self._cross.lerp_(other._cross, share)
        return self

    def on_host(self) -> BatchPearson:
        """Return the averages in the host's memory."""
        mean, std = (tuple(x.cpu() for x in pair) for pair in (self._mean, self._std))
        return BatchPearson(self.batches, mean, std, None if self._cross is None else self._cross.cpu())

    def similarity(self) -> torch.Tensor:
        """Return the (n, m) float64 correlation of A's units (rows) to B's."""
        if self._cross is None:
            raise ValueError("moments: no sample was read")
        covariance = self._cross - torch.outer(*self._mean)
        return covariance / (torch.outer(*self._std) + 1e-4)
