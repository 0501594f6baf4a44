"""Permutations together with the spec that says where they apply, and how they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from fastmatch._internal.batches import Forward, default_forward
from fastmatch._internal.checks import check_type
from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, state_of
from fastmatch.permutations.apply import apply_permutations, check_permutations, compose, invert
from fastmatch.permutations.files import load_permutations, save_permutations
from fastmatch.permutations.verify import Verification
from fastmatch.spec import Permutations, PermutationSpec

if TYPE_CHECKING:
    from fastmatch.report.report import Report

__all__ = ["Alignment", "Matching"]


@dataclass(frozen=True, eq=False)
class Matching:
    """The outcome of a matcher.

    Example:
        >>> matching = fm.align(model_a, model_b, x).matching
        >>> matching.matcher, matching.converged
        ('WeightMatching', True)

    Attributes:
        permutations: group name -> LongTensor (size,), ``new_b[i] = b[perm[i]]``.
        matcher: the class name of the matcher, or of the strategy for many models.
        objective: the values of the objective that the matcher maximizes, from the start to the result; the matcher's
            ``match`` says which.
        sweeps: passes over the groups.
        solves: assignment problems solved.
        skipped: solves omitted because no neighbour of the group had moved.
        converged: no group can improve any more by itself.
        gaps: group -> (gap, gap_bound) of its last assignment problem, as :class:`fastmatch.assignment.Assignment` has
            them. Groups of heads or experts are not in it: they are many small problems.
        order: the groups in the order of their solves, for matchers that solve one after the other. Ranks that share the
            solves find what one process finds that takes this order, which does not depend on their number.
    """

    permutations: Permutations
    matcher: str
    objective: tuple[float, ...]
    sweeps: int = 1
    solves: int = 0
    skipped: int = 0
    converged: bool = True
    gaps: dict[str, tuple[float, float]] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """How it ended, as text. Training does not converge: it has lowered the loss, or weight matching's result is kept."""
        if self.matcher == "StraightThrough":
            first, last = self.objective
            is_kept = last <= first or last != last  # where the loss was NaN at first, any number is better
            kept = "no epoch lowered the loss, weight matching's result is kept"
            return kept if is_kept else "the loss fell"
        return "converged" if self.converged else "not converged"


@dataclass(frozen=True, repr=False, eq=False)
class Alignment:
    """Permutations of a model's hidden units, with the spec that says where they apply.

    Example:
        >>> alignment = fm.align(model_a, model_b, x)
        >>> aligned_b = alignment.apply(model_b)
        >>> alignment.compose(alignment.invert()).moved
        0

    Attributes:
        permutations: group name -> LongTensor (size,); ``new_b[i] = b[perm[i]]``. Groups that are not given stay in
            place.
        spec: which axes move together.
        matching: how the permutations were found; None if they were loaded, inverted or composed.
        proof: the comparison that showed that the spec keeps the model's function. None if there was none: state dicts
            and checkpoints cannot always be run.
        method: the matcher with its options, as Python; empty if unknown.
        seconds: part of the run -> seconds that it took.

    Raises:
        ValueError: a group is not in the spec, or its permutation is not one of its units.
    """

    permutations: Permutations
    spec: PermutationSpec
    matching: Matching | None = None
    proof: Verification | None = None
    method: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutations", check_permutations(self.permutations, self.spec))

    @property
    def moved(self) -> int:
        """The number of units that change their place."""
        return sum(int((p != torch.arange(len(p), device="cpu")).sum()) for p in self.permutations.values())

    @overload
    def apply(self, model: nn.Module) -> nn.Module: ...
    @overload
    def apply(self, model: State) -> dict[str, torch.Tensor]: ...
    def apply(self, model: nn.Module | State) -> nn.Module | dict[str, torch.Tensor]:
        """Return a new model, or state dict, with the units reordered; ``model`` is not changed.

        Of a model that is divided among ranks (DTensor) all ranks make the call. It is gathered tensor by tensor and stays
        divided.

        Raises:
            ValueError: a tensor that the spec moves is missing or has another shape.
            TypeError: ``model`` is neither a module nor a state dict.
        """
        state = state_of(model, "model", may_be_divided=True)
        moved = apply_permutations(state, self.spec, self.permutations)
        return with_state(model, moved) if isinstance(model, nn.Module) else moved

    def __repr__(self) -> str:
        total = sum(map(len, self.permutations.values()))
        text = f"Alignment({len(self.permutations)} groups, {self.moved} of {total} units moved"
        if self.matching is not None:
            first, last = self.matching.objective[0], self.matching.objective[-1]
            text += f", {self.matching.matcher} objective {first:.6g} -> {last:.6g}"
        return text + ("" if self.proof else ", not proved") + ")"

    def report(
        self,
        model_a: nn.Module | State,
        model_b: nn.Module | State,
        data: Iterable[Any] | None = None,
        *,
        names: Sequence[str] = ("A", "B"),
        points: int = 7,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        forward: Forward = default_forward,
    ) -> Report:
        """Return a page and a summary of what the alignment did: match quality by layer, barriers, structure, time.

        Example:
            >>> alignment = fm.align(model_a, model_b, x)
            >>> report = alignment.report(model_a, model_b, test_loader, points=3)
            >>> report.save("report.html")

            A notebook shows ``report`` as the page; ``print(report)`` is one screen of text.

        Args:
            model_a, model_b: the models that were aligned, B as it was before. State dicts work too, without ``data``.
            data: a loader. On inputs alone the activations of matched units are compared; on (inputs, targets) also
                the loss on the line between the models, before and after. None compares weights only.
            names: what to call A and B.
            points: positions on each of the two curves.
            loss, forward: see :func:`fastmatch.interpolate`; None takes its loss.

        Returns:
            A :class:`fastmatch.Report`.

        Raises:
            TypeError: ``data`` is given with a state dict, which cannot be run, or it is an iterator.
            ValueError: the models have other architectures.

        Cost: every tensor is read once; with data also four passes over it, and ``2 * points`` for the curves.
        """
        from fastmatch.report.alignment import alignment_report

        return alignment_report(
            self, model_a, model_b, data, names=names, points=points, loss=loss, forward=forward
        )

    def invert(self) -> Alignment:
        """Return the alignment that undoes this one."""
        return Alignment(invert(self.permutations, self.spec), self.spec, proof=self.proof)

    def compose(self, then: Alignment) -> Alignment:
        """Return one alignment equal to applying this one and then ``then``.

        Raises:
            TypeError: ``then`` is not an alignment.
            ValueError: the two do not have the same groups.
        """
        check_type("then", then, Alignment)
        proof = self.proof if then.proof else None
        return Alignment(compose(self.permutations, then.permutations, self.spec), self.spec, proof=proof)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write permutations and spec to a .safetensors file; an existing file is replaced only with ``force``."""
        save_permutations(self.permutations, self.spec, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Return what :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        return cls(*load_permutations(path))
