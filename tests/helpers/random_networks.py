"""Networks of random operations, to hunt for axes that are moved and must not be."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

from helpers.random_operators import OPERATORS
from helpers.random_steps import FLAT
from helpers.random_structures import STRUCTURES

__all__ = ["STEPS", "RandomNetwork"]

STEPS = [*FLAT, *STRUCTURES, *OPERATORS]

SMALL = 1e-6
"""What rows of results are divided by, if their norms are smaller."""


class RandomNetwork(nn.Module):
    """A random program in float64 over a few (batch, n) tensors; the same program whenever it is run.

    Layers are made while the program is first run, when it is known how wide their inputs are.
    """

    def __init__(self, seed: int, steps: int = 12) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        self.layers = nn.ParameterDict()
        self.log: list[str] = []

    def weight(self, name: str, *shape: int, kind: torch.dtype = torch.float64) -> torch.Tensor:
        if name not in self.layers:
            self.layers[name] = nn.Parameter(
                torch.randn(shape, dtype=kind) / max(shape[-1:] or (1,)) ** 0.5, requires_grad=False
            )
        return self.layers[name]

    def running(self, name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a mean and a variance that are buffers."""
        if not hasattr(self, f"mean{name}"):
            self.register_buffer(f"mean{name}", torch.randn(size, dtype=torch.float64))
            self.register_buffer(f"variance{name}", torch.rand(size, dtype=torch.float64) + 0.5)
        return getattr(self, f"mean{name}"), getattr(self, f"variance{name}")

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        rng = random.Random(self.seed)
        live, self.log = [x, *others], []
        for step in range(self.steps):
            choice = rng.choice(STEPS)
            at = rng.randrange(len(live))
            h = live[at]
            self.log.append(f"{choice.__name__} of {at}, {h.shape[1]} wide")
            live.append(choice(self, rng, f"s{step}_", h, live))
            if len(live) > 4:
                live.pop(rng.randrange(3))
        # What is zero but for rounding stays small: made as large as the others, it would be all that is compared.
        last = torch.cat([F.normalize(t.clone(), dim=1, eps=SMALL) for t in live], 1)
        return F.linear(last, self.weight("head", 5, last.shape[1]))
