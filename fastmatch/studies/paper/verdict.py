"""Verdicts from paired differences over seeds: an effect, its confidence interval, and what it decides.

Every function takes numbers only, so that tests can plant any counterexample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, TypeAlias

__all__ = ["FEWEST_SEEDS", "LEVEL", "Effect", "Verdict", "combined", "effect", "overall"]

Verdict: TypeAlias = Literal["holds", "does not hold", "undecided", "nothing to mend", "not measured"]
"""Of a case or a claim. "nothing to mend": the fault that the claim is about does not occur."""

LEVEL = 0.95
"""Of the confidence intervals, for one case at a time."""

FEWEST_SEEDS = 5
"""With fewer seeds an interval says nothing, and every verdict is "undecided"."""


@dataclass(frozen=True)
class Effect:
    """Differences of one kind, one per seed, and the least difference that counts.

    Attributes:
        name: what was subtracted from what.
        mean: of the differences.
        low: end of the confidence interval; -inf with too few seeds.
        high: end of the confidence interval; inf with too few seeds.
        least: the smallest difference that counts.
    """

    name: str
    mean: float
    low: float
    high: float
    least: float

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies above ``least``, below it, or on both sides."""
        if self.low > self.least:
            return "holds"
        return "does not hold" if self.high <= self.least else "undecided"


def effect(name: str, differences: Sequence[float], least: float) -> Effect:
    """Return the mean of paired differences with its interval by Student's t.

    Example:
        >>> from fastmatch.studies.paper.verdict import effect
        >>> effect("after - before", [0.20, 0.25, 0.22, 0.24, 0.19], 0.01).verdict
        'holds'
        >>> effect("after - before", [0.0, 0.0, 0.0, 0.0, 0.0], 0.01).verdict
        'does not hold'

    Args:
        name: what was subtracted from what.
        differences: one per seed, finite.
        least: the smallest difference that counts.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    if not differences or not all(map(math.isfinite, differences)):
        raise ValueError(f"differences: expected at least one, all finite; got {list(differences)}")
    mean, count = fmean(differences), len(differences)
    if count < FEWEST_SEEDS:
        return Effect(name, mean, -math.inf, math.inf, least)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * stdev(differences) / math.sqrt(count)
    return Effect(name, mean, mean - half, mean + half, least)


def combined(effects: Iterable[Effect]) -> Verdict:
    """Return the verdict of a case, for which every effect must be there."""
    return overall(e.verdict for e in effects)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict of a claim: it holds if it holds in every case in which there was something to mend."""
    counted = [v for v in verdicts if v not in ("nothing to mend", "not measured")]
    if not counted:
        return "not measured"
    if "does not hold" in counted:
        return "does not hold"
    return "undecided" if "undecided" in counted else "holds"
