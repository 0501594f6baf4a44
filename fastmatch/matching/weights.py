"""Weight matching: coordinate ascent over groups of units (Git Re-Basin, Ainsworth et al. 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastmatch._internal.allowed import Init
from fastmatch._internal.checks import check_choice, check_integer, check_number, check_type
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.states import State, headers_of, state_of
from fastmatch.matching.ascent import Ascent, Hooks
from fastmatch.matching.held import HeldState
from fastmatch.matching.matcher import Matcher, Model
from fastmatch.matching.objective import Include, WeightObjective
from fastmatch.permutations.alignment import Matching
from fastmatch.permutations.apply import check_permutations
from fastmatch.spec import Permutations, PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = ["Init", "WeightMatching", "check_unbalanced", "match_weights"]


@dataclass(frozen=True, eq=False)
class WeightMatching(Matcher):
    """Match units by their weights: maximize ``sum_t <A_t, P B_t>`` over the permutations P of B's units.

    The sum of inner products runs over the tensors t that the spec moves. The ascent solves one group at a time, all
    others held, until no group can improve by itself. Each sweep visits the groups in a random order and solves
    only those that have moved, or share a tensor with one that has moved, since they were last solved. The objective
    never falls.

    Example:
        >>> alignment = fm.align(model_a, model_b, x, fm.WeightMatching(seed=1))
        >>> objective = alignment.matching.objective
        >>> objective[-1] >= objective[0]
        True

    Args:
        init: where to begin. ``"greedy"`` matches the groups one after the other in the first sweep, each by the
            weights whose other axes are matched already; if the objective is lower then, it begins again at the
            identity. ``"identity"`` begins with B's units as they are, as published. A mapping from group names to
            permutations, (size,) integers each, begins there; groups that it omits are initialized greedily.
        max_sweeps: the largest number of passes over the groups.
        tolerance: the least rise of the objective that counts, relative to the product of the norms of A's and B's
            parameters.
        include: which tensors enter: ``"weights"`` only matrices and kernels, ``"affine"`` also biases, norm scales
            and shifts, ``"statistics"`` also the running statistics of batch norm.
        balance: compare balanced copies of the networks (:func:`fastmatch.balance`), where units have incoming and
            outgoing weights of equal norms. The match then does not depend on scales that a ReLU network leaves open. Only
            :func:`fastmatch.align` of two modules with example inputs can do so, because it has to prove on them which
            units may be scaled. The networks themselves are not balanced: merge the balanced ones if their scales differ.
        seed: of the random order of groups.

    Raises:
        ValueError: an option is out of range; the message names it.

    Cost: for a group of n units with d parameters each, 2 n^2 d operations per solve (fewer if few of its
    neighbours moved) and one n x n assignment problem. Memory: n^2, and kept gains of up to the size of both models.
    """

    init: Init | Mapping[str, torch.Tensor] = "greedy"
    max_sweeps: int = 100
    tolerance: float = 1e-12
    include: Include = "affine"
    seed: int = 0
    balance: bool = False

    def __post_init__(self) -> None:
        check_type("balance", self.balance, bool)
        if isinstance(self.init, Mapping):
            for name in self.init:
                if not isinstance(name, str):
                    raise ValueError(f"init: expected names of groups as keys; got {name!r}")
            object.__setattr__(self, "init", {name: _index(name, p) for name, p in self.init.items()})
        else:
            check_choice("init", self.init, Init, "permutations by names of groups")
        check_integer("max_sweeps", self.max_sweeps, least=1)
        check_number("tolerance", self.tolerance)
        check_choice("include", self.include, Include)
        check_integer("seed", self.seed)

    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A.

        Args:
            model_a, model_b: modules or state dicts of the same architecture; A is the reference. Neither is changed.
                Half precision is matched in float32. A mapping that reads its tensors from disk is asked for a
                tensor whenever it is needed.
            spec: which axes move together.
            progress: show progress bars; None shows them on a terminal.

        Returns:
            A :class:`Matching`; its ``objective`` has the value before the first sweep and after each sweep.

        Raises:
            ValueError: a tensor of the spec is missing or has another shape, or ``init`` does not fit the spec.
        """
        a, b = _state(model_a, "model_a"), _state(model_b, "model_b")
        return match_weights(a, b, spec, self, progress=progress)


def _state(model: Model, argument: str) -> State:
    """The named tensors of a model; a mapping that is not a dict may read them from disk, so none is asked for yet."""
    if isinstance(model, Mapping) and not isinstance(model, dict):
        return model
    return state_of(model, argument)


def _index(name: str, permutation: object) -> torch.Tensor:
    """A copy of the permutation as a LongTensor on the CPU; ValueError unless it is one."""
    try:
        index = torch.as_tensor(permutation, device="cpu").detach().cpu()  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"init[{name!r}]: expected integers of shape (size,), got {permutation!r}"
        ) from error
    if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"init[{name!r}]: expected integers of shape (size,), got shape {tuple(index.shape)} of {index.dtype}"
        )
    if not torch.equal(index.long().sort().values, torch.arange(len(index), device="cpu")):
        raise ValueError(f"init[{name!r}]: not a permutation of 0..{len(index) - 1}")
    return index.long().clone()


def check_unbalanced(matcher: WeightMatching) -> None:
    """Raise ValueError if the matcher compares balanced networks, which needs inputs to run them on."""
    if matcher.balance:
        raise ValueError(
            "balance: needs modules and example inputs, which only fm.align(model_a, model_b, x, "
            "fm.WeightMatching(balance=True)) has; else call fm.balance before, and match and merge the balanced models"
        )


def match_weights(
    a: State,
    b: State,
    spec: PermutationSpec,
    matcher: WeightMatching | None = None,
    hooks: Hooks | None = None,
    *,
    progress: bool | None = None,
) -> Matching:
    """Match two state dicts by their weights, with hooks into the ascent.

    A tensor is asked for whenever it is needed, so a state may read its tensors from disk.

    Args:
        a, b: state dicts of the same architecture; A is the reference.
        spec: which axes move together.
        matcher: the options; ``WeightMatching()`` for None.
        hooks: what other algorithms add, what a run that may be interrupted needs, and the ranks that share the work;
            those of torch's process group for None.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        ValueError: a tensor of the spec is missing or has another shape, or ``init`` does not fit the spec.
    """
    matcher, hooks = matcher or WeightMatching(), hooks or Hooks()
    with hooks.ranks.together():
        if not (hooks.ranks.is_nested or hooks.out_of_core):  # else the caller has compared them
            options = {"matcher": matcher, "spec": spec, "bonus": hooks.bonus}
            models = {"model_a": a, "model_b": b}
            check_same_on_ranks(hooks.ranks, "WeightMatching.match", options, models)
        return _match(a, b, spec, matcher, hooks, progress)


def _match(
    a: State, b: State, spec: PermutationSpec, matcher: WeightMatching, hooks: Hooks, progress: bool | None
) -> Matching:
    import numpy as np

    check_unbalanced(matcher)
    check_spec(spec, headers_of(a), "model_a")
    check_spec(spec, headers_of(b), "model_b")
    if hooks.out_of_core:
        a, b = HeldState(a), HeldState(b)
    problem = WeightObjective(a, b, spec, matcher.include, hooks.bonus, hooks.ranks, hooks.survey)
    start = _start(matcher.init, spec)
    complete = check_permutations(start, spec, "init")
    threshold = matcher.tolerance * problem.scale()
    ascent = Ascent(problem, complete, threshold, hooks, progress)
    if hooks.orders is None:
        generator = np.random.default_rng(matcher.seed)
        count = len(ascent.names)
        orders = (generator.permutation(count).tolist() for _ in range(matcher.max_sweeps))
        missing = [name for name in ascent.names if name not in start]
        if missing:
            ascent.initialize_greedily(missing)
    else:
        orders = hooks.orders
    while ascent.stale and ascent.sweeps < matcher.max_sweeps:
        order = next(orders, None)
        if order is None:
            break
        ascent.sweep([ascent.names[i] for i in order])
    return ascent.outcome("WeightMatching")


def _start(init: Init | Mapping[str, torch.Tensor], spec: PermutationSpec) -> Permutations:
    """The permutations to begin at; groups that are missing are initialized greedily."""
    if isinstance(init, Mapping):
        return dict(init)
    return spec.identity() if init == "identity" else {}
