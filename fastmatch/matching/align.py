"""Align two models in one call: trace, verify, match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastmatch._internal.callers import warn_user
from fastmatch._internal.divided import divided_name
from fastmatch._internal.ranks import current
from fastmatch._internal.same_on_ranks import check_same_on_ranks
from fastmatch._internal.states import (
    State,
    check_finite,
    check_same_architecture,
    check_same_names,
    state_of,
)
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch.matching.balance import balance
from fastmatch.matching.divided_on_ranks import check_divided, match_divided
from fastmatch.matching.matcher import Matcher, Model, as_code, check_matcher
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import verify as verify_spec
from fastmatch.spec import PermutationSpec
from fastmatch.spec.checks import check_spec
from fastmatch.spec.common import other_sizes, resized, restricted

__all__ = ["align", "traced_spec", "warn_if_nothing_moves"]


def align(
    model_a: Model,
    model_b: Model,
    example_inputs: Any = None,
    matcher: Matcher | None = None,
    *,
    spec: PermutationSpec | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> Alignment:
    """Align model B to model A: find the permutation of B's hidden units that matches them to A's.

    Example:
        >>> alignment = fm.align(model_a, model_b, x)
        >>> aligned_b = alignment.apply(model_b)
        >>> torch.allclose(aligned_b(x), model_b(x), atol=1e-4)
        True

        By activations on data instead of by weights:

        >>> alignment = fm.align(model_a, model_b, x, fm.ActivationMatching(loader))

    In a torch.distributed process group all ranks make the call with the same arguments, share the work, and get the same
    alignment. :func:`fastmatch.alone` keeps a call to one rank. Models that are divided among ranks (DTensor, as FSDP2 and
    tensor parallelism make them) are matched by weights; a tensor is gathered when it is needed. There is no proof for them.

    Args:
        model_a, model_b: modules of the same architecture, or state dicts (which need ``spec``). A is the reference.
            Neither is changed. Tensors may differ in the size of an axis that no group moves, such as heads for other
            classes: they are not matched, and a warning names them.
        example_inputs: a tensor, a tuple of positional inputs, or several of these as :class:`Examples`, on which
            ``model_a`` is traced; a batch of 2 is enough. With ``spec`` they are only used to verify.
        matcher: how units are matched: :class:`WeightMatching` (for None), :class:`ActivationMatching`,
            :class:`Mixture`, :class:`FisherMatching` or :class:`StraightThrough`.
        spec: which axes move together, instead of tracing. ``spec.select([...])`` and ``spec.without_residual()``
            match some groups only.
        verify: prove on ``example_inputs``, in float64, that the spec does not change the function of ``model_b``.
            That takes six forward passes of a copy. State dicts cannot be run: ``alignment.proof`` is then None.
        progress: show progress bars; None shows them on a terminal, for work of more than a second.

    Returns:
        An :class:`Alignment`, with the outcome of the matcher as ``alignment.matching``.

    Raises:
        ValueError: the architectures differ (the first difference is named), weights are NaN or infinite (the
            tensor is named), the spec changes the function (the group is named), or the data yields nothing.
        TypeError: a model is neither a module nor a state dict, ``matcher`` is not a matcher, or it does not match
            models that are divided among ranks.
        RuntimeError: another rank failed or does not answer; the message names it.

    Cost: see the matcher's class.
    """
    matcher = WeightMatching() if matcher is None else matcher
    check_matcher("matcher", matcher)
    ranks, watch = current(), Stopwatch()
    with ranks.together():
        a, b = (
            state_of(model, name, may_be_divided=True)
            for model, name in ((model_a, "model_a"), (model_b, "model_b"))
        )
        is_divided = divided_name(a) is not None or divided_name(b) is not None
        if is_divided:
            check_divided(matcher, ranks)
        check_same_names(a, b)
        check_finite(a, "model_a")
        check_finite(b, "model_b")
        options = {"matcher": matcher, "spec": spec, "verify": verify}
        check_same_on_ranks(ranks, "align", options, {"model_a": a, "model_b": b})
        if spec is None:
            with watch("trace"):
                spec = traced_spec(model_a, example_inputs, "model_a")
        own = other_sizes(spec, a, b)
        check_same_architecture(a, {**b, **{name: a[name] for name in own}})
        common = restricted(spec, set(spec.shapes) - set(own)) if own else spec
        check_spec(common, a, "model_a")
        spec = resized(spec, own, b)
        if own:
            warn_user(_left_out(own, a, b))
        warn_if_nothing_moves(spec, "align")
        proof = None
        if verify and example_inputs is not None and isinstance(model_b, nn.Module) and not is_divided:
            with watch("verify"):
                proof = verify_spec(model_b, spec, example_inputs)
        compared, how = (model_a, model_b), matcher
        if isinstance(matcher, WeightMatching) and matcher.balance:
            with watch("balance"):
                compared = _balanced(model_a, model_b, example_inputs)
            how = replace(matcher, balance=False)
        with watch("match"):
            if is_divided:
                matching = match_divided(a, b, common, how, ranks, progress)
            else:
                matching = how.match(*compared, common, progress=progress)
    return Alignment(matching.permutations, spec, matching, proof, as_code(matcher), watch.seconds)


def _balanced(model_a: Model, model_b: Model, example_inputs: Any) -> tuple[nn.Module, nn.Module]:
    if example_inputs is None or not (isinstance(model_a, nn.Module) and isinstance(model_b, nn.Module)):
        raise ValueError(
            "balance: needs two modules and example inputs, on which it proves which units may be scaled; "
            "state dicts cannot be run"
        )
    return balance(model_a, example_inputs).model, balance(model_b, example_inputs).model


def _left_out(names: list[str], a: State, b: State) -> str:
    sizes = ", ".join(f"{n} {tuple(b[n].shape)}, not {tuple(a[n].shape)}" for n in names)
    return f"align: model_b has tensors of another size than model_a, which are not matched: {sizes}"


def warn_if_nothing_moves(spec: PermutationSpec, function: str) -> None:
    """Warn, at the line that called ``function``, of a spec without groups."""
    if not spec.groups:
        warn_user(
            f"{function}: no group of units is free to move, so nothing will be matched; "
            "`fastmatch inspect` or spec.table() lists what pins them"
        )


def traced_spec(model: Model, example_inputs: Any, argument: str) -> PermutationSpec:
    """Return the spec of a model, traced on the example inputs.

    Raises:
        ValueError: the model is a state dict, which cannot be traced, or there are no example inputs.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"spec: {argument} is a state dict, and state dicts cannot be traced; "
            "give a spec (PermutationSpec.trace(model, x))"
        )
    if example_inputs is None:
        raise ValueError(
            f"example_inputs: needed to trace the structure of {argument}, unless spec is given; "
            "a batch of 2 is enough"
        )
    return PermutationSpec.trace(model, example_inputs)
