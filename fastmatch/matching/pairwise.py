"""Strategies that match many models two at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastmatch.matching.matcher import Matcher, Model, Strategy, check_matcher, check_rereadable
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment
from fastmatch.spec import PermutationSpec

__all__ = ["Chain", "ToReference"]


@dataclass(frozen=True)
class ToReference(Strategy):
    """Match each model to the reference.

    Example:
        >>> alignments = fm.align_many([model_a, model_b], x, fm.ToReference(fm.ActivationMatching(loader)))
        >>> len(alignments)
        2

    Args:
        matcher: how two models are matched. Its data, if it has any, is read for every model but the reference.

    Raises:
        TypeError: ``matcher`` is not a matcher, or its data is an iterator, which can be read only once.
    """

    matcher: Matcher = WeightMatching()

    def __post_init__(self) -> None:
        check_matcher("matcher", self.matcher)
        check_rereadable("matcher", self.matcher)

    def match(
        self,
        models: Sequence[Model],
        spec: PermutationSpec,
        reference: int = 0,
        *,
        progress: bool | None = None,
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`."""
        found = {reference: Alignment(spec.identity(), spec)}
        for k in _others(len(models), reference):
            matching = self.matcher.match(models[reference], models[k], spec, progress=progress)
            found[k] = Alignment(matching.permutations, spec, matching)
        return [found[k] for k in range(len(models))]


@dataclass(frozen=True)
class Chain(Strategy):
    """Match each model to its aligned predecessor, in the given order from the reference on and around.

    Example:
        >>> alignments = fm.align_many([model_a, model_b], x, fm.Chain(fm.WeightMatching(seed=1)))
        >>> alignments[0].moved
        0

    Args:
        matcher: how two models are matched. Its data, if it has any, is read for every model but the reference.

    Raises:
        TypeError: ``matcher`` is not a matcher, or its data is an iterator, which can be read only once.
    """

    matcher: Matcher = WeightMatching()

    def __post_init__(self) -> None:
        check_matcher("matcher", self.matcher)
        check_rereadable("matcher", self.matcher)

    def match(
        self,
        models: Sequence[Model],
        spec: PermutationSpec,
        reference: int = 0,
        *,
        progress: bool | None = None,
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`."""
        found = {reference: Alignment(spec.identity(), spec)}
        target = models[reference]
        for k in _others(len(models), reference):
            matching = self.matcher.match(target, models[k], spec, progress=progress)
            found[k] = Alignment(matching.permutations, spec, matching)
            target = found[k].apply(models[k])
        return [found[k] for k in range(len(models))]


def _others(count: int, reference: int) -> Iterator[int]:
    return ((reference + step) % count for step in range(1, count))
