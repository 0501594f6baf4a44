"""Two checkpoints that are matched: what they have in common, and what a journal of their match depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmatch._internal.ranks import ALONE, Ranks
from fastmatch._internal.states import prefix_of, under_prefix
from fastmatch.checkpoint.diffusion.pipeline import pipeline_layout
from fastmatch.checkpoint.modules import leave_what_does_not_fit
from fastmatch.checkpoint.names import Layout, RenamedCheckpoint, layout_of, layout_without
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.checkpoint.structure import bind, build_empty
from fastmatch.checkpoint.survey import Surveyed, survey
from fastmatch.checkpoint.tracing import common_spec, names_in, take_names, take_tied_names
from fastmatch.matching.ascent import Hooks, Step
from fastmatch.matching.matcher import as_code
from fastmatch.matching.weights import WeightMatching, check_unbalanced, match_weights
from fastmatch.permutations.alignment import Alignment
from fastmatch.spec import PermutationSpec

__all__ = ["Pair", "check_runs_nothing", "layout_for", "open_pair"]


def check_runs_nothing(matcher: object) -> None:
    """Raise unless the matcher needs no network that runs, as weight matching of networks that are not balanced."""
    if not isinstance(matcher, WeightMatching):
        raise TypeError(
            f"matcher: expected a WeightMatching, because the networks are not run; got {type(matcher).__name__}"
        )
    check_unbalanced(matcher)


@dataclass(frozen=True)
class Pair:
    """Checkpoint B, which is matched to checkpoint A.

    Attributes:
        a, b: the checkpoints.
        layout: B's, in the parameters of the spec.
        whole: the spec of all that B has.
        common: of what A has as well; only this is matched.
    """

    a: Checkpoint
    b: Checkpoint
    layout: Layout
    whole: PermutationSpec
    common: PermutationSpec

    @classmethod
    def of(cls, a: Checkpoint, b: Checkpoint, traced: PermutationSpec) -> Pair:
        """Bind the spec that was traced for B to both.

        Raises:
            ValueError: A and B differ, or nothing can be permuted.
        """
        leave_what_does_not_fit(b, traced)
        take_tied_names(a, b)
        take_names(a, b)
        layout = layout_for(b.path, b, traced)
        whole = bind(traced, RenamedCheckpoint(b, layout).headers, str(b.path))
        pair = cls(a, b, layout, whole, whole)
        common = common_spec(whole, pair._model(a), pair._model(b))
        if not common.groups:
            raise ValueError(f"{a.path}: no group of units is free to move")
        return cls(a, b, layout, whole, common)

    def _model(self, checkpoint: Checkpoint) -> RenamedCheckpoint:
        """Return a checkpoint under the names of the parameters that it has of B's."""
        return RenamedCheckpoint(
            checkpoint, {k: chunk for k, chunk in self.layout.items() if k in checkpoint}
        )

    def survey(self, ranks: Ranks = ALONE) -> Surveyed:
        """Read every tensor once, by one of the ranks; see :func:`fastmatch.checkpoint.survey.survey`."""
        return survey(self.a, self.b, ranks)

    def run(self, matcher: WeightMatching, surveyed: Surveyed) -> dict[str, str]:
        """Return what the result of a match depends on, by name.

        ``max_sweeps`` is not in it: a run that goes on may take more of them.
        """
        settings = {"seed": matcher.seed, "include": matcher.include, "tolerance": matcher.tolerance}
        found = {
            "the tensors of A": surveyed.digests[0],
            "the tensors of B": surveyed.digests[1],
            "the groups": _hash(self.common.to_json()),
        }
        return found | {name: repr(value) for name, value in settings.items()} | {"init": _init_of(matcher)}

    def match(
        self,
        matcher: WeightMatching,
        surveyed: Surveyed,
        remembered: Callable[[str, Callable[[], Step]], Step],
        *,
        ranks: Ranks = ALONE,
        progress: bool | None,
    ) -> Alignment:
        """Match what both have. The alignment moves what only B has as well.

        Args:
            matcher: the options.
            surveyed: what :meth:`survey` found.
            remembered: makes a step or repeats it from a journal.
            ranks: the processes that share the work.
        """
        hooks = Hooks(
            out_of_core=True,
            in_blocks=True,
            remembered=remembered,
            ranks=ranks,
            survey=surveyed.of(self.layout),
        )
        models = self._model(self.a), self._model(self.b)
        matching = match_weights(*models, self.common, matcher, hooks, progress=progress)
        return Alignment(matching.permutations, self.whole, matching, method=as_code(matcher))


def layout_for(path: str | Path, checkpoint: Checkpoint, spec: PermutationSpec) -> Layout:
    """Return the layout of a checkpoint in the spec's parameters: the names of the file, or those after a prefix of all of them.

    Raises:
        ValueError: the spec's parameters have a prefix in the file, and other tensors have none.
    """
    if checkpoint.parts:
        return pipeline_layout(checkpoint.parts)
    named = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    if named <= set(checkpoint):
        prefix = ""
    elif (Path(path) / CONFIG).is_file():
        return layout_of(build_empty(path), checkpoint.headers, str(path))
    else:
        prefix = prefix_of(named, checkpoint)
    if not all(name.startswith(prefix) for name in checkpoint):
        raise ValueError(f"{path}: {under_prefix(prefix, checkpoint, str(path))}")
    return layout_without(prefix, checkpoint.headers)


def open_pair(
    path_a: str | Path, path_b: str | Path, spec: PermutationSpec
) -> tuple[RenamedCheckpoint, RenamedCheckpoint]:
    """Return the tensors that two checkpoints have in common, under the names of the spec that was traced for B."""
    a, b = Checkpoint(path_a), Checkpoint(path_b)
    a.rename(names_in(b, of=a))
    layout = {name: chunk for name, chunk in layout_for(path_b, b, spec).items() if name in a}
    return RenamedCheckpoint(a, layout), RenamedCheckpoint(b, layout)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _init_of(matcher: WeightMatching) -> str:
    """Return the matcher's initialization as text: the word, or a hash of the permutations."""
    if isinstance(matcher.init, str):
        return matcher.init
    text = repr(sorted((name, torch.as_tensor(p, device="cpu").tolist()) for name, p in matcher.init.items()))
    return _hash(text)
