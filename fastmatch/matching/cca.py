"""Similarity after whitening: what canonical correlation analysis sees of two layers (CCA-Merge, Horoi et al. 2024)."""

from __future__ import annotations

import torch

from fastmatch.statistics.moments import CrossMoments

__all__ = ["GAMMA", "Canonical", "roots"]

GAMMA = 0.1
"""Added to a covariance's diagonal, as a share of its mean: CCA-Merge's choice."""


def roots(covariance: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of a covariance with ``gamma`` times its mean variance on the diagonal, and its inverse."""
    shift = max(gamma * float(covariance.diagonal().mean()), 1e-12)
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values = (values.clamp(min=0) + shift).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


class Canonical:
    """``S_a^-1/2 S_ab S_b^-1/2``: covariances S once what each unit shares with its own network's others is undone.

    Its singular values are the canonical correlations and the orthogonal factor of its polar form is the map that
    CCA-Merge takes; the assignment finds the permutation that earns most of them. Memory: (2n)^2 float64.
    """

    def __init__(self, gamma: float = GAMMA) -> None:
        self.gamma = gamma
        self.joint = CrossMoments()
        self.size = 0

    def update(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Adds rows of (samples, n) activations of both networks."""
        self.size = a.shape[1]
        both = torch.cat([a, b.to(a)], dim=1)
        self.joint.update(both, both)

    def similarity(self) -> torch.Tensor:
        """(n, n) float64."""
        covariance, n = self.joint.similarity("covariance"), self.size
        if not bool(torch.isfinite(covariance).all()):
            return covariance[:n, n:]  # the caller names the group
        white_a, white_b = (roots(covariance[s, s], self.gamma)[1] for s in (slice(n), slice(n, None)))
        return white_a @ covariance[:n, n:] @ white_b
