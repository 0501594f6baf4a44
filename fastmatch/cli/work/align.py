"""The work of ``fastmatch align`` and ``align-many``, once their options are checked."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import default_forward
from fastmatch._internal.files import shared_metadata
from fastmatch._internal.launching import is_alone, is_first
from fastmatch._internal.model_files import load_state_for, with_names_of
from fastmatch._internal.ranks import joined
from fastmatch._internal.states import check_finite, check_same_architecture, state_of
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch._internal.words import count_of
from fastmatch.cli.align_checks import JOINT, ROUNDS, check_align, is_out_of_core
from fastmatch.cli.groups import selected
from fastmatch.cli.loading import build_model, build_network, example_from, function_from, load_into
from fastmatch.cli.matchers import matcher_from
from fastmatch.cli.options import device_from, dtype_from
from fastmatch.cli.outputs import say
from fastmatch.cli.reports import report_data, write_report
from fastmatch.cli.speaking import speaking
from fastmatch.cli.work.align_many_on_disk import align_many_on_disk
from fastmatch.cli.writing import write_weights
from fastmatch.matching.align import align
from fastmatch.matching.align_many import align_many
from fastmatch.matching.frank_wolfe import FrankWolfe
from fastmatch.matching.matcher import Matcher, Strategy
from fastmatch.matching.merge_many import MergeMany
from fastmatch.matching.pairwise import Chain, ToReference
from fastmatch.matching.weights import WeightMatching
from fastmatch.merging.average import merge_states
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import verify
from fastmatch.spec import PermutationSpec
from fastmatch.spec.common import other_sizes

__all__ = ["align_all", "align_pair"]

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "to-reference": ToReference,
    "chain": Chain,
    "merge-many": MergeMany,
    "frank-wolfe": FrankWolfe,
}
"""The words of ``--strategy``."""
ALIGNED = 0.99
"""Share of units that stay from which two models count as already aligned."""
LIMITED = [STRATEGIES[word].__name__ for word in JOINT]
"""The strategies whose rounds are limited, as matchings name them."""


def align_pair(args: argparse.Namespace) -> None:
    """Align two checkpoints and write the second one aligned, or the merge of both; torchrun's ranks share the work."""
    with joined() as ranks, ranks.together(), speaking(ranks):
        if not is_alone():  # alone, they are checked before torch is loaded
            check_align(args)
        _align_pair(args)


def _align_pair(args: argparse.Namespace) -> None:
    models = data = None
    if is_out_of_core(args):
        alignment = _align_out_of_core(args)
    else:
        alignment, models, data = _align_in_memory(args)
    if not is_first():
        return
    said = {"out": args.out, "permutations": args.permutations, "report": args.report}
    say(args, f"{_summary(alignment)}; wrote {_written(args)}", **_record(alignment), **said)
    if args.report is not None:
        from fastmatch.checkpoint.pairs import open_pair

        a, b = models or open_pair(args.a, args.b, alignment.spec)
        forward = function_from(args.forward, "--forward", default_forward)
        write_report(alignment.report(a, b, data, names=(args.a, args.b), forward=forward), args)


def _align_in_memory(
    args: argparse.Namespace,
) -> tuple[Alignment, tuple[nn.Module, nn.Module], Iterable[Any] | None]:
    """Return the alignment, both networks as they were before it, and the data of the report."""
    matcher, data = matcher_from(args), report_data(args)
    model, example = build_network(args)
    states = [load_state_for(model, path) for path in (args.a, args.b)]
    try:
        check_same_architecture(state_of(model, "--model"), states[0], "--model", args.a)
        check_same_architecture(state_of(model, "--model"), states[1], "--model", args.b)
    except ValueError as error:
        raise ValueError(f"{error}{_other_heads(args, model, example, matcher, states)}") from error
    for path, state in zip((args.a, args.b), states, strict=True):
        check_finite(state, path)
    # The modules have the builder's types. The states keep the types of the files, which the output has too.
    model_b = copy.deepcopy(model)
    model.load_state_dict(states[0])
    model_b.load_state_dict(states[1])
    watch = Stopwatch()
    with watch("trace"):
        spec = selected(PermutationSpec.trace(model, example, unread=args.unread), args)
    if not spec.groups:
        raise ValueError(
            f"--model: no group of units of {args.model} is free to move; see `fastmatch inspect`"
        )
    with watch("verify"):
        proof = None if args.no_verify else verify(model_b, spec, example)
    if isinstance(matcher, WeightMatching) and not matcher.balance:
        alignment = align(*states, matcher=matcher, spec=spec)
    else:
        alignment = align(model, model_b, example, matcher, spec=spec, verify=False)  # it is proved above
    alignment = replace(alignment, proof=proof, seconds={**watch.seconds, **alignment.seconds})
    result = alignment.apply(states[1])
    if args.merge is not None:
        result = merge_states([states[0], result], [1 - args.merge, args.merge])
    described = [args.b] if args.merge is None else [args.a, args.b]
    if is_first():
        if args.permutations is not None:
            alignment.save(args.permutations, force=args.force)
        result = with_names_of(result, args.b, model)
        write_weights(result, args.out, force=args.force, metadata=shared_metadata(described))
    return alignment, (model, model_b), data


def _other_heads(
    args: argparse.Namespace,
    model: nn.Module,
    example: Any,
    matcher: Matcher,
    states: list[dict[str, torch.Tensor]],
) -> str:
    """Return what an error about shapes can add where the checkpoints differ in heads alone: out of core those are left out."""
    if not isinstance(matcher, WeightMatching) or matcher.balance:
        return ""
    a, b = states
    try:
        heads = other_sizes(PermutationSpec.trace(model, example, unread=args.unread), a, b)
        check_same_architecture(a, {**b, **{name: a[name] for name in heads}})
    except ValueError:  # they differ in more, or the example does not fit
        return ""
    if not heads:
        return ""
    built = state_of(model, "--model")
    fits = all(b[name].shape == built[name].shape for name in heads)
    builder = "" if fits else f" and a --model that builds {args.b}"
    return f". With --out-of-core{builder}, {' and '.join(heads)} of another size are left out and the rest is aligned"


def _align_out_of_core(args: argparse.Namespace) -> Alignment:
    """Return the alignment of two checkpoints whose tensors are read when they are needed."""
    from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints
    from fastmatch.checkpoint.proof import LARGEST
    from fastmatch.checkpoint.same_model import check_same_sizes
    from fastmatch.checkpoint.tracing import prove_checkpoint, trace_checkpoint

    matcher = matcher_from(args)
    assert isinstance(matcher, WeightMatching)
    write = WriteOptions(args.merge, dtype_from(args.dtype), args.force, args.permutations)
    device = device_from(args.device)
    spec, proof = None, None
    if args.model is None:
        # Without options of the structure the library traces it, and proves it when it has seen that A and B fit.
        if args.groups is not None or not args.residual or args.unread != "refuse":
            checkpoint = Checkpoint(args.b)
            check_same_sizes(Checkpoint(args.a), checkpoint)
            traced = trace_checkpoint(args.b, checkpoint, unread=args.unread)
            proof = prove_checkpoint(args.b, checkpoint, traced)
            spec = selected(traced, args)
    else:
        model, example = build_network(args)
        traced = PermutationSpec.trace(model, example, unread=args.unread)
        # A copy in float64 of a model that is aligned out of core may not fit.
        small = sum(t.numel() for t in model.parameters()) <= LARGEST
        proof = verify(model, traced, example) if small else None
        spec = selected(traced, args)
    alignment = align_checkpoints(
        args.a,
        args.b,
        args.out,
        matcher,
        spec=spec,
        write=write,
        device=device,
        resume=args.resume,
    )
    return alignment if spec is None else replace(alignment, proof=proof)


def align_all(args: argparse.Namespace) -> None:
    """Align all checkpoints to the order of the first one and write the others."""
    if args.model is None:
        align_many_on_disk(args, _summary, _record)
        return
    strategy = _strategy_from(args)
    model, built = build_model(args.model)
    models = [load_into(model, path) for path in args.checkpoints]
    found = align_many(models, example_from(args.input_shape, built), strategy)
    lines, records = [], []
    for alignment, path, out in zip(found[1:], args.checkpoints[1:], args.out, strict=True):
        moved = alignment.apply(load_state_for(model, path))  # in the types of the file
        moved = with_names_of(moved, path, model)
        write_weights(moved, out, force=args.force, metadata=shared_metadata([path]))
        lines.append(f"{path}: {_summary(alignment)}; wrote {out}")
        records.append({"checkpoint": path, **_record(alignment), "out": out})
    say(args, "\n".join(lines), alignments=records)


def _strategy_from(args: argparse.Namespace) -> Strategy:
    """Build the strategy that the options describe, with its matcher; see :func:`matcher_from`."""
    options = {name: getattr(args, name) for name in ROUNDS if getattr(args, name) is not None}
    if args.strategy in JOINT and args.init is None:
        args.init = "identity"  # where these strategies start
    return STRATEGIES[args.strategy](matcher_from(args), **options)


def _summary(alignment: Alignment) -> str:
    """Return what was found as text: groups, moved units, objective, work, and how it ended."""
    matching = alignment.matching
    assert matching is not None
    total = sum(len(p) for p in alignment.permutations.values())
    limit = "--max-rounds" if matching.matcher in LIMITED else "--max-sweeps"
    state = matching.outcome + ("" if matching.converged else f", raise {limit}")
    stay = 1 - alignment.moved / max(total, 1)
    already = f" (already aligned: {stay:.1%} of units stay)" if stay >= ALIGNED else ""
    return (
        f"{count_of(len(alignment.permutations), 'group')}, {alignment.moved} of {total} units moved{already}; objective "
        f"{matching.objective[0]:.6g} -> {matching.objective[-1]:.6g} in {count_of(matching.sweeps, 'sweep')}, "
        f"{count_of(matching.solves, 'assignment')} ({state}); {_proof_of(alignment)}"
    )


def _written(args: argparse.Namespace) -> str:
    """Return what was written where, as text."""
    what = (
        args.out if args.merge is None else f"the merge {1 - args.merge:g} A + {args.merge:g} B to {args.out}"
    )
    if args.dtype is not None:
        what += f" in {args.dtype}"
    return what if args.permutations is None else f"{what} and {args.permutations}"


def _record(alignment: Alignment) -> dict[str, Any]:
    """Return what was found as plain values."""
    matching = alignment.matching
    if matching is None:
        return {"groups": len(alignment.permutations)}
    return {
        "groups": len(alignment.permutations),
        "units": sum(len(p) for p in alignment.permutations.values()),
        "moved": alignment.moved,
        "objective": list(matching.objective),
        "sweeps": matching.sweeps,
        "assignments": matching.solves,
        "converged": matching.converged,
        "proof_error": None if alignment.proof is None else alignment.proof.error,
    }


def _proof_of(alignment: Alignment) -> str:
    """Return as text whether the function of B is known to stay the same."""
    if alignment.proof is None:
        return "not proved to keep B's function"
    return f"proved to keep the function (error {alignment.proof.error:.1g})"
