"""What a family of costs is: a maker of matrices, the problem it stands for, and the number types it suits."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Generator = np.random.Generator
Maker = Callable[[Generator, int, int], np.ndarray]

LARGEST_INTEGER = 2**30
"""Size up to which rounded costs are kept. Sums of differences of two such integers fit in int32."""


@dataclass(frozen=True)
class Family:
    """A family of cost matrices. Call it for an instance: ``family(n, m, seed, dtype)``.

    Args:
        name: words that stand in reports.
        stands_for: whose problem it is.
        make: takes a generator, n and m; returns an (n, m) matrix of any number type.
        unit: the factor by which costs are multiplied before they are rounded to integers. None where rounding would
            leave another problem.
        doubles_only: float32 would overflow or leave another problem.
        forbids: entries may be +inf. A matching of the shorter side without them always exists.
    """

    name: str
    stands_for: str
    make: Maker
    unit: float | None = 1000.0
    doubles_only: bool = False
    forbids: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The number types that the family suits."""
        floats = ("float64",) if self.doubles_only else ("float32", "float64")
        return floats if self.unit is None or self.forbids else (*floats, "int32")

    def __call__(self, n: int, m: int, seed: int, dtype: str = "float64") -> np.ndarray:
        """Return the (n, m) instance of a seed, C-contiguous. Names and seeds give independent streams of numbers."""
        if dtype not in self.dtypes:
            raise ValueError(f"{self.name}: expected a dtype among {', '.join(self.dtypes)}, got {dtype}")
        g = np.random.default_rng([seed, n, m, zlib.crc32(self.name.encode())])
        cost = self.make(g, n, m)
        if dtype == "int32" and cost.dtype.kind == "f":
            cost = np.rint(cost * self.unit).clip(-LARGEST_INTEGER, LARGEST_INTEGER)
        if dtype == "float32" and not self.forbids:  # the largest float64 becomes the largest float32
            largest = np.finfo(np.float32).max
            cost = cost.clip(-largest, largest)
        return np.ascontiguousarray(cost, dtype)


def planted(g: Generator, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of a random matching of the shorter side."""
    k = min(n, m)
    return g.permutation(n)[:k], g.permutation(m)[:k]


def repeated(g: Generator, different: int, total: int) -> np.ndarray:
    """Return ``total`` indices below ``different`` in random order, each equally often up to one."""
    return g.permutation(np.arange(total) % max(1, min(different, total)))
