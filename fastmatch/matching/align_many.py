"""Align many models into one order of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastmatch._internal.checks import check_integer
from fastmatch._internal.ranks import current, on_all_ranks
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.states import State, check_finite, check_models, check_same_architecture, state_of
from fastmatch.matching.align import traced_spec, warn_if_nothing_moves
from fastmatch.matching.matcher import Strategy, check_strategy
from fastmatch.matching.pairwise import ToReference
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import Verification
from fastmatch.permutations.verify import verify as verify_spec
from fastmatch.spec import PermutationSpec
from fastmatch.spec.checks import check_spec

__all__ = ["align_many"]


@on_all_ranks
def align_many(
    models: Sequence[nn.Module] | Sequence[State],
    example_inputs: Any = None,
    strategy: Strategy | None = None,
    *,
    reference: int = 0,
    spec: PermutationSpec | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> list[Alignment]:
    """Align models to the order of units of ``models[reference]``, whose own alignment is the identity.

    The map between any two models is a composition of two alignments, so every cycle of maps is the identity.

    Example:
        >>> models = [model_a, model_b]
        >>> alignments = fm.align_many(models, x, fm.MergeMany())
        >>> merged = fm.merge([f.apply(m) for f, m in zip(alignments, models)])
        >>> from_a_to_b = alignments[0].compose(alignments[1].invert())

    Args:
        models: two or more modules of the same architecture, or state dicts (which need ``spec``). None is changed.
        example_inputs: a tensor or a tuple of positional inputs, on which the reference is traced; a batch of 2 is
            enough. With ``spec`` they are only used to verify.
        strategy: how they are matched: :class:`ToReference` (for None), :class:`Chain`, :class:`MergeMany` or
            :class:`FrankWolfe`.
        reference: the index of the model that stays as it is.
        spec: which axes move together, instead of tracing.
        verify: prove on ``example_inputs``, in float64, that the spec does not change the function of any model that
            moves. That takes six forward passes of a copy of each. State dicts cannot be run: ``alignment.proof`` is
            then None.
        progress: show progress bars; None shows them on a terminal, for work of more than a second.

    Returns:
        One :class:`Alignment` per model.

    Raises:
        ValueError: fewer than two models, ``reference`` is out of range, or a reason that :func:`align` has.
        TypeError: a model is neither a module nor a state dict, or ``strategy`` is not a strategy.
        RuntimeError: another rank failed or does not answer; the message names it.

    In a torch.distributed process group all ranks make the call with the same arguments, and share the work of the matcher.
    """
    strategy = ToReference() if strategy is None else strategy
    check_strategy("strategy", strategy)
    check_models("models", models, least=2)
    check_integer("reference", reference)
    if reference >= len(models):
        raise ValueError(f"reference: expected an index below {len(models)}, got {reference!r}")
    states = [state_of(m, f"models[{k}]") for k, m in enumerate(models)]
    for k, state in enumerate(states):
        check_same_architecture(states[0], state, "models[0]", f"models[{k}]")
        check_finite(state, f"models[{k}]")
    options = {"strategy": strategy, "reference": reference, "spec": spec, "verify": verify}
    named = {f"models[{k}]": state for k, state in enumerate(states)}
    check_same_on_ranks(current(), "align_many", options, named)
    if spec is None:
        spec = traced_spec(models[reference], example_inputs, f"models[{reference}]")
    check_spec(spec, states[reference], f"models[{reference}]")
    warn_if_nothing_moves(spec, "align_many")
    proofs: dict[int, Verification] = {}
    if verify and example_inputs is not None:
        for k, model in enumerate(models):
            if k != reference and isinstance(model, nn.Module):
                proofs[k] = verify_spec(model, spec, example_inputs)
    proofs |= {reference: next(iter(proofs.values()))} if proofs else {}  # it does not move
    found = strategy.match(models, spec, reference, progress=progress)
    return [replace(alignment, proof=proofs.get(k)) for k, alignment in enumerate(found)]
