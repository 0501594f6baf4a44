"""Families of assignment problems: what people file bug reports about, and what the engine was built for.

    from bench.lib.families import FAMILIES
    cost = FAMILIES["sums of integers"](300, 300, seed=0, dtype="float64")

Every instance is a C-contiguous matrix to be minimized, feasible in every shape, and the same for the same seed. Those of
``FACTOR_FAMILIES`` are :class:`Factors`, whose matrix a solver may avoid.
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
from bench.lib.families.factors import FACTOR_FAMILIES, FactorFamily, Factors
from bench.lib.families.family import Family

__all__ = ["DTYPES", "FACTOR_FAMILIES", "FAMILIES", "FactorFamily", "Factors", "Family", "select"]

DTYPES = ("float64", "float32", "int32", "factors")
"""What costs come as in the benchmark. A family names those that it suits."""

MODULES = (random_values, ties, formulas, geometry, networks, preferences, forbidden, scales, hard)

FAMILIES: dict[str, Family] = {family.name: family for module in MODULES for family in module.FAMILIES}
"""Every family of matrices by its name."""


def select(pattern: str) -> list[Family | FactorFamily]:
    """Return the families, those of factors included, whose name fits a pattern such as ``gains*``, or one of several with ``;`` between them.

    Raises:
        ValueError: a pattern fits none.
    """
    every: dict[str, Family | FactorFamily] = {
        **FAMILIES,
        **{family.name: family for family in FACTOR_FAMILIES},
    }
    found: dict[str, Family | FactorFamily] = {}
    for part in pattern.split(";"):
        fitting = {name: family for name, family in every.items() if fnmatchcase(name, part.strip())}
        if not fitting:
            raise ValueError(f"families: no name fits {part.strip()!r}")
        found |= fitting
    return list(found.values())
