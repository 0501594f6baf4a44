"""Similarity after whitening, as in canonical correlation analysis of two layers (CCA-Merge, Horoi et al. 2024)."""

from __future__ import annotations

import torch

from fastmatch.statistics.moments import CrossMoments

__all__ = ["RIDGE", "WhitenedCovariance", "roots"]

RIDGE = 0.1
"""Regularization of a covariance: this fraction of its mean variance is added to the diagonal. CCA-Merge adds 0.1
whatever the variances are, which is nothing for large activations and everything for small ones."""


def roots(
    covariance: torch.Tensor, ridge: float, gamma: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the square root of a covariance, and its inverse.

    ``ridge`` times the mean variance is added to the diagonal first, or ``gamma`` itself if it is given.
    """
    shift = max(ridge * float(covariance.diagonal().mean()) if gamma is None else gamma, 1e-12)
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values = (values.clamp(min=0) + shift).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


class WhitenedCovariance:
    """``S_a^-1/2 S_ab S_b^-1/2``: the cross covariance after the correlations within each network are whitened.

    Its singular values are the canonical correlations. CCA-Merge maps units by the orthogonal factor of its polar
    decomposition; the assignment takes the permutation with the largest sum instead. Memory: (2n)^2 float64.
    """

    def __init__(self, ridge: float = RIDGE) -> None:
        self.ridge = ridge
        self.joint = CrossMoments()
        self.size = 0

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add (samples, n) activations of both networks."""
        self.size = a.shape[1]
        both = torch.cat([a, b.to(a)], dim=1)
        self.joint.update(both, both)

    def merge(self, other: WhitenedCovariance) -> WhitenedCovariance:
        """Add the samples that another one has seen, and return this one."""
        self.joint, self.size = self.joint.merge(other.joint), self.size or other.size
        return self

    def on_host(self) -> WhitenedCovariance:
        """Return the moments in the host's memory."""
        found = WhitenedCovariance(self.ridge)
        found.joint, found.size = self.joint.on_host(), self.size
        return found

    def similarity(self) -> torch.Tensor:
        """Return the (n, n) float64 similarity of A's units (rows) to B's."""
        covariance, n = self.joint.similarity("covariance"), self.size
        if not bool(torch.isfinite(covariance).all()):
            return covariance[:n, n:]  # the caller names the group
        white_a, white_b = (roots(covariance[s, s], self.ridge)[1] for s in (slice(n), slice(n, None)))
        return white_a @ covariance[:n, n:] @ white_b
