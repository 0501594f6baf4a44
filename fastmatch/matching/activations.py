"""Activation matching: units that respond alike to data (Li et al. 2015; Ainsworth et al. 2022, section 3.1).

Both models are run once over the data. The similarity matrix of each group is one linear assignment problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastmatch._internal.batches import Forward, batches_of, check_data, check_forward, default_forward
from fastmatch._internal.callers import warn_user
from fastmatch._internal.checks import check_choice
from fastmatch._internal.divided import check_undivided
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.ranks import Ranks, current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.shared_data import batches_of_rank, read_in_step, runs_alone
from fastmatch._internal.words import first_of
from fastmatch.matching.gain_solves import solve_gain
from fastmatch.matching.matcher import Matcher, Model, modules_of
from fastmatch.matching.nested import best_orders
from fastmatch.matching.sharing import Sharing
from fastmatch.matching.similarity import Similarity, measure_similarities
from fastmatch.matching.sites import Reduce, choose_readings
from fastmatch.permutations.alignment import Matching
from fastmatch.spec import Permutations, PermutationSpec
from fastmatch.spec.activation_sites import Site

__all__ = ["ActivationMatching", "best_permutation"]


@dataclass(frozen=True, eq=False)
class ActivationMatching(Matcher):
    """Match units by their activations on data: maximize the similarity of matched units, group by group.

    Both models are run on the data once. A permutation of earlier units does not change a network's function, so the
    groups are independent and each is one exact assignment problem.

    Example:
        >>> alignment = fm.align(model_a, model_b, x, fm.ActivationMatching(loader))
        >>> before, after = alignment.matching.objective
        >>> after >= before
        True

    Args:
        data: batches of inputs or of (inputs, targets): a loader or any iterable, read once per pair of models. The
            targets are not used.
        similarity: how two units are compared. ``"correlation"`` (Pearson), ``"covariance"`` and ``"inner"`` product
            are pooled over all samples; ``"batch-correlation"`` averages over batches, as published code does;
            ``"cca"`` is the covariance after the correlations within each network are whitened (CCA-Merge).
        site: read activations ``"post"`` (after) or ``"pre"`` (before) the nonlinearity. A group without
            nonlinearity is read where the next layer takes it in (post), or where its own layer returns it (pre).
        reduce: if a group has several sites (a residual stream), take the ``"last"`` or the ``"first"``, or ``"sum"``
            their similarities.
        forward: ``forward(model, batch)`` runs a model on one batch.

    Raises:
        ValueError: an option is none of the words above; the message names it.
        TypeError: ``data`` is not an iterable of batches, or ``forward`` is not callable.

    In a torch.distributed process group the ranks share the data by batches, of which all ranks give the same: a
    DataLoader (rank 0 draws its order; a DistributedSampler's seed and epoch are kept, its padding is not) or a list. The
    moments of up to 64 blocks of batches are merged in a fixed tree, so the result does not depend on the number of ranks.
    Models in DistributedDataParallel, whose ranks run together, are run on all batches by each rank.

    Memory: per site one n x n float64 matrix, and one batch of activations; in a process group up to seven matrices.
    """

    data: Iterable[Any] = field(repr=False)
    similarity: Similarity = "correlation"
    site: Site = "post"
    reduce: Reduce = "last"
    forward: Forward = field(default=default_forward, repr=False)

    def __post_init__(self) -> None:
        check_data(self.data)
        check_choice("similarity", self.similarity, Similarity)
        check_choice("site", self.site, Site)
        check_choice("reduce", self.reduce, Reduce)
        check_forward(self.forward)

    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A.

        Args:
            model_a, model_b: modules of the traced architecture; A is the reference. Neither is changed.
            spec: a traced spec, which knows where activations can be read.
            progress: show progress bars; None shows them on a terminal.

        Returns:
            A :class:`Matching`; its ``objective`` is the similarity of matched units, summed over groups, under the
            identity and under the result.

        Raises:
            TypeError: a model is a state dict, which cannot be run.
            ValueError: the spec has no site for a group, the data yields nothing, activations are not finite, or no unit's
                vary, as with a single sample.

        Warns:
            UserWarning: no unit of some groups varies, or no operation shows them on the same samples in both networks, so that they stay
                in place.
        """
        ranks = current()
        with ranks.together():
            return self._match(model_a, model_b, spec, ranks, progress)

    def _match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, ranks: Ranks, progress: bool | None
    ) -> Matching:
        gains = self._measure(model_a, model_b, spec, progress)
        _check_varies(gains)
        permutations: Permutations = spec.identity()
        subgroups: dict[str, list[tuple[str, ...]]] = {}
        for (outer, _), names in spec.subgroups().items():
            if names in gains:
                subgroups.setdefault(outer, []).append(names)
        names = [name for name in spec.top_level() if (name,) in gains or name in subgroups]
        _warn_apart([name for name in spec.top_level() if name not in names])
        before: list[float] = []
        after = 0.0
        gaps: dict[str, tuple[float, float]] = {}

        def solve_group(name: str) -> _Found:
            inner = {names: gains[names] for names in subgroups.get(name, ())}
            if inner:
                return _match_nested(spec, name, inner)
            gain = gains[name,]
            return _match_group(name, gain)

        sharing = Sharing(ranks, {name: spec.groups[name].size ** 3 for name in names}, is_bound=True)
        parts = sharing.of(names, solve_group)
        for name, part in progress_bar(parts, "assignment", show=progress, total=len(names)):
            found = part()
            permutations |= found.permutations
            before += found.before
            after += found.after
            gaps |= {} if found.gap is None else {name: found.gap}
        objective = sum(before), after
        order = tuple(names)
        return Matching(
            permutations, "ActivationMatching", objective, solves=len(gains), gaps=gaps, order=order
        )

    def similarities(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the (size, size) float64 similarity of A's units to B's for each group without subgroups.

        Groups with subgroups are omitted: how similar their units are depends on the order of the units within.
        """
        with current().together():
            gains = self._measure(model_a, model_b, spec.flat(), progress)
        return {name: gain for (name,), gain in gains.items()}

    def _measure(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, progress: bool | None
    ) -> dict[tuple[str, ...], torch.Tensor]:
        """(group,), or the subgroups of one kind, -> the similarity of their units."""
        models = modules_of(model_a, model_b)
        for name, model in zip(("model_a", "model_b"), models, strict=True):
            check_undivided(model, name)
        ranks, title = current(), "activation matching"
        if not ranks.is_nested:
            options = {"matcher": self, "spec": spec}
            named = {"model_a": models[0], "model_b": models[1]}
            check_same_on_ranks(ranks, "ActivationMatching.match", options, named)
        readings = choose_readings(spec, self.site, self.reduce)
        if not ranks.is_group or not all(map(runs_alone, models)):
            batches = read_in_step(batches_of(self.data, title, progress=progress), *models)
            return measure_similarities(
                models, spec, readings, self.similarity, self.site, batches, self.forward
            )
        share = batches_of_rank(self.data, ranks)
        batches = progress_bar(share.batches, title, show=progress)
        return measure_similarities(
            models, spec, readings, self.similarity, self.site, batches, self.forward, (ranks, share.blocks)
        )


def _warn_apart(names: Sequence[str]) -> None:
    """Warn of groups that are not compared."""
    if names:
        warn_user(
            f"spec: {len(names)} groups stay in place, because no operation shows them on the same samples in both networks, as "
            f"experts whose tokens a router chooses: {first_of(names)}. fm.WeightMatching() matches them"
        )


def _check_varies(gains: Mapping[tuple[str, ...], torch.Tensor]) -> None:
    """Raise ValueError if nothing tells units apart; warn if that is so in some groups only."""
    constant = [names[0] for names, gain in gains.items() if not bool(gain.any())]
    if constant and len(constant) == len(gains):
        raise ValueError(
            "data: the activations of no unit vary over the samples, so nothing tells units apart; give more samples that differ"
        )
    if constant:
        warn_user(
            f"data: the activations of no unit vary in {len(constant)} of {len(gains)} groups, which stay in place: {first_of(constant)}"
        )


class _Found(NamedTuple):
    """Permutations, and the similarity of matched units before (one value per similarity matrix) and after.

    ``gap`` is (gap, gap_bound) of the assignment; None for a group with subgroups, which is many small ones.
    """

    permutations: Permutations
    before: list[float]
    after: float
    gap: tuple[float, float] | None = None


def _match_group(name: str, gain: torch.Tensor) -> _Found:
    solution = solve_gain(gain)
    permutation = _settled(gain, torch.from_numpy(solution.col_ind))
    after = float(_entries(gain, torch.arange(len(gain), device="cpu"), permutation).sum())
    gap = solution.gap, solution.gap_bound
    return _Found({name: permutation}, [float(gain.diagonal().sum())], after, gap)


def _match_nested(spec: PermutationSpec, name: str, gains: dict[tuple[str, ...], torch.Tensor]) -> _Found:
    """Match a group by the best orders of its subgroups, and the subgroups by these orders."""
    found = {names: best_orders(gain, spec.groups[name].size) for names, gain in gains.items()}
    value = torch.stack([optima for _, optima in found.values()]).sum(dim=0)
    outer = best_permutation(value)
    permutations = {name: outer}
    for names, (orders, _) in found.items():
        permutations |= {g: orders[i, outer[i]] for i, g in enumerate(names)}
    before = [float(gain.diagonal().sum()) for gain in gains.values()]
    return _Found(permutations, before, float(value.gather(1, outer[:, None]).sum()))


def best_permutation(gain: torch.Tensor) -> torch.Tensor:
    """Return the permutation of largest gain; of equally good ones, one that leaves more units in place.

    Units that respond alike to the data (dead ones, say) may have different inputs, so a model that is matched with
    itself should be left alone. After the assignment, unit i takes its own column wherever exchanging two columns
    loses nothing.
    """
    solution = solve_gain(gain)
    return _settled(gain, torch.from_numpy(solution.col_ind))


def _settled(gain: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    """Return a permutation of the same gain in which units keep their own columns where nothing is lost."""
    units = torch.arange(len(gain), device="cpu")
    owner = perm.argsort()  # the unit that has the column of unit i
    largest = float(gain.abs().max()) if len(gain) else 0.0

    def loss(i: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.stack([i, owner[i], i, owner[i]]), torch.stack([perm[i], i, i, perm[i]])
        taken, lost, own, others = _entries(gain, rows, columns)
        return taken + lost - own - others

    tolerance = 1e-12 * largest
    for i in units[(perm != units) & (loss(units) <= tolerance)]:
        if perm[i] != i and loss(i) <= tolerance:
            other, column = owner[i].clone(), perm[i].clone()
            perm[other], owner[column] = column, other
            perm[i], owner[i] = i, i
    return perm


def _entries(gain: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``gain[rows, columns]`` on the CPU: on a GPU it is gathered there, and nothing else crosses."""
    return gain[rows.to(gain.device), columns.to(gain.device)].cpu()
