"""Strategies that match many models two at a time."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from fastmatch.matching.matcher import Matcher, Model, Models, Strategy, check_matcher, check_rereadable
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment
from fastmatch.spec import PermutationSpec

__all__ = ["Chain", "ToReference"]


@dataclass(frozen=True, eq=False)
class _Pairwise(Strategy):
    """What the strategies of this file share: one matcher, and one match per model but the reference."""

    matcher: Matcher = WeightMatching()

    def __post_init__(self) -> None:
        check_matcher("matcher", self.matcher)
        check_rereadable("matcher", self.matcher)

    def match(
        self, models: Models, spec: PermutationSpec, reference: int = 0, *, progress: bool | None = None
    ) -> list[Alignment]:
        """Return one alignment per model; see :meth:`Strategy.match`."""
        found = {reference: Alignment(spec.identity(), spec)}
        target = models[reference]
        for k in ((reference + step) % len(models) for step in range(1, len(models))):
            matching = self.matcher.match(target, models[k], spec, progress=progress)
            found[k] = Alignment(matching.permutations, spec, matching)
            target = self._next_target(target, models[k], found[k])
        return [found[k] for k in range(len(models))]

    @abstractmethod
    def _next_target(self, target: Model, model: Model, alignment: Alignment) -> Model:
        """Return what the next model is matched to, after ``model`` was matched to ``target``."""


@dataclass(frozen=True, eq=False)
class ToReference(_Pairwise):
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

    def _next_target(self, target: Model, model: Model, alignment: Alignment) -> Model:
        return target


@dataclass(frozen=True, eq=False)
class Chain(_Pairwise):
    """Match each model to its aligned predecessor, in the given order from the reference on and around.

    Example:
        >>> alignments = fm.align_many([model_a, model_b], x, fm.Chain(fm.WeightMatching(seed=1)))
        >>> alignments[0].moved
        0

    The argument and the errors are those of :class:`ToReference`.
    """

    def _next_target(self, target: Model, model: Model, alignment: Alignment) -> Model:
        return alignment.apply(model)
