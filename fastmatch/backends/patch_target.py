"""What a replacement is: where a library publishes a function, and what takes its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["REFUSED", "Seam", "is_small"]

SMALL = 200
"""Rows or columns below which the libraries' own solvers are as fast as a call of ours: they keep those."""

REFUSED = (ValueError, TypeError)
"""What our solver raises for inputs it does not take; the original then answers, or raises its own error."""


@dataclass(frozen=True)
class Seam:
    """A function of another library that can be replaced.

    Attributes:
        library: the name users give to ``installed``.
        module: where the library publishes the function.
        name: the function's name there; ``Class.method`` for a method.
        build: makes the replacement from the original, which it falls back on.
    """

    library: str
    module: str
    name: str
    build: Callable[[Callable[..., Any]], Callable[..., Any]]


def is_small(cost: np.ndarray) -> bool:
    """Whether a matrix is left to the original solver."""
    return cost.ndim == 2 and min(cost.shape) < SMALL
