"""Pairs of factors whose inner products are assigned: what the reports on the list solver measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True)
class FactorKind:
    """How a pair of factors is drawn.

    ``gaussian``: independent Gaussian rows. ``log-normal``: their norms are scaled by exp(level * Gaussian).
    ``sibling``: rows of B are rows of A, shuffled, with noise of standard deviation ``level``.
    """

    name: Literal["gaussian", "log-normal", "sibling"]
    rank: int
    level: float = 0.0

    def __str__(self) -> str:
        extra = {"sibling": f", noise {self.level}", "gaussian": "", "log-normal": f", spread {self.level}"}
        return f"{self.name}, d = {self.rank}{extra[self.name]}"

    def draw(self, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two float32 factors of shape (n, rank), to be matched for the largest sum of inner products."""
        g = np.random.default_rng([seed, n])
        a = g.standard_normal((n, self.rank), np.float32)
        if self.name == "sibling":
            b = (a + self.level * g.standard_normal(a.shape, np.float32))[g.permutation(n)]
        else:
            b = g.standard_normal(a.shape, np.float32)
            for x in (a, b):
                x *= np.exp(self.level * g.standard_normal((n, 1))).astype(np.float32)
        return torch.from_numpy(a), torch.from_numpy(b.astype(np.float32))
