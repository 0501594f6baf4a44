"""A patch target: a function that another library publishes, and how to build its replacement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["UNSUPPORTED", "PatchTarget", "is_small"]

LEAST_SIZE = 200
"""Rows or columns. Below it the libraries' own solvers are as fast as one call of ours, so they keep the problem."""

UNSUPPORTED = (ValueError, TypeError)
"""The errors our solver raises for unsupported inputs. The original function then answers or raises its own error."""


@dataclass(frozen=True)
class PatchTarget:
    """A function of another library that can be replaced.

    Attributes:
        library: the name that users pass to ``installed``.
        module: the module in which the library publishes the function.
        name: the function's name in that module; ``Class.method`` for a method.
        build: makes the replacement from the original function, which the replacement falls back on.
    """

    library: str
    module: str
    name: str
    build: Callable[[Callable[..., Any]], Callable[..., Any]]


def is_small(cost: np.ndarray) -> bool:
    """Return whether a cost matrix is too small to be worth a call of our solver."""
    return cost.ndim == 2 and min(cost.shape) < LEAST_SIZE
