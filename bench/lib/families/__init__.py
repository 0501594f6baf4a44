"""Families of assignment problems: what people file bug reports about, and what the engine was built for.

    from bench.lib.families import FAMILIES
    cost = FAMILIES["sums of integers"](300, 300, seed=0, dtype="float64")

Every instance is a C-contiguous matrix to be minimized, feasible in every shape, and the same for the same seed.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from bench.lib.families import (
    forbidden,
    formulas,
    geometry,
    hard,
    networks,
    preferences,
    random_values,
    scales,
    ties,
)
from bench.lib.families.family import Family

__all__ = ["DTYPES", "FAMILIES", "Family", "select"]

DTYPES = ("float64", "float32", "int32")
"""The number types of the benchmark. A family names those that it suits."""

MODULES = (random_values, ties, formulas, geometry, networks, preferences, forbidden, scales, hard)

FAMILIES: dict[str, Family] = {family.name: family for module in MODULES for family in module.FAMILIES}
"""Every family by its name."""


def select(pattern: str) -> list[Family]:
    """Return the families whose name fits a pattern such as ``gains*``, or one of several with ``;`` between them.

    Raises:
        ValueError: a pattern fits none.
    """
    found: dict[str, Family] = {}
    for part in pattern.split(";"):
        fitting = {name: family for name, family in FAMILIES.items() if fnmatchcase(name, part.strip())}
        if not fitting:
            raise ValueError(f"families: no name fits {part.strip()!r}")
        found |= fitting
    return list(found.values())
