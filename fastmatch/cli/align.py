"""``fastmatch align`` and ``align-many``: bring checkpoints into one order of units and write them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from fastmatch._internal.batches import default_forward
from fastmatch._internal.checks import check_fraction
from fastmatch._internal.files import STATE_SUFFIXES, shared_metadata
from fastmatch._internal.locks import hidden
from fastmatch._internal.model_files import load_state_for, with_names_of
from fastmatch._internal.ranks import is_first, joined
from fastmatch._internal.states import check_finite, check_same_architecture, state_of
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch._internal.words import count_of
from fastmatch.cli.align_many_on_disk import add_many_options, align_many_on_disk, check_many_options
from fastmatch.cli.groups import selected
from fastmatch.cli.loading import (
    build_model,
    build_network,
    example_from,
    function_from,
    in_a_folder,
    load_into,
)
from fastmatch.cli.options import (
    Commands,
    add,
    add_command,
    add_matcher_options,
    device_from,
    dtype_from,
    matcher_from,
)
from fastmatch.cli.outputs import check_inputs, check_outputs, say, write_weights
from fastmatch.cli.reports import PAGES, report_data, write_report
from fastmatch.cli.speaking import speaking
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
from fastmatch.spec.unread import Unread

__all__ = ["add_commands", "kept_by"]

PAIRWISE = {"to-reference": ToReference, "chain": Chain}
ALIGNED = 0.99
"""Share of units that stay from which two models count as already aligned."""
JOINT = {"merge-many": MergeMany, "frank-wolfe": FrankWolfe}
ROUNDS = [strategy.__name__ for strategy in JOINT.values()]
"""The strategies whose rounds are limited, as matchings name them."""


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "align", align_command,
        examples=(
            "align a.safetensors b.safetensors --model net.py:build --input-shape 2,3,32,32 --out b_aligned.safetensors",
            "align a.pt b.pt --model net:build --matcher activations --data net:loader --out b_aligned.pt",
            "align llama-a llama-b --out llama-b-aligned",
        ),
    )  # fmt: skip
    command.add_argument(
        "a",
        help="the reference: .safetensors, a torch file of tensors, or a directory of Hugging Face or torch.distributed.checkpoint",
    )
    command.add_argument("b", help="the checkpoint whose units are permuted")
    add(
        command, "--model",
        help="callable that returns the network, or (network, example inputs); not needed for directories with a "
        "config.json",
    )  # fmt: skip
    add(command, "--input-shape")
    add(
        command,
        "--out",
        help="what to write: .safetensors, .ckpt, .pt, .pth or .bin; a directory for directories",
    )
    command.add_argument(
        "--merge", type=float, metavar="W", help="write the merge (1 - W) A + W B instead of the aligned B"
    )
    command.add_argument(
        "--permutations",
        metavar="FILE",
        help="also write the permutations and the spec to this .safetensors file",
    )
    add(command, "--force", "--report", "--report-data")
    add_matcher_options(command)
    command.add_argument(
        "--groups",
        nargs="+",
        metavar="NAME",
        help="match only these groups, by their names in `fastmatch inspect` or what they are there; with patterns, such "
        "as 'layers.*.mlp.*'",
    )
    command.add_argument(
        "--no-residual", dest="residual", action="store_false", help="keep the order of residual streams"
    )
    command.add_argument(
        "--unread", choices=get_args(Unread), default="refuse",
        help="what to do about parameters that the traced pass does not read, such as another task's head: refuse them by "
        "name, hold the groups that they could share in place, or ignore them (default: refuse)",
    )  # fmt: skip
    command.add_argument(
        "--no-verify", action="store_true", help="do not check that the permutations preserve B's function"
    )
    out_of_core = command.add_argument_group(
        "out of core",
        "read tensors when they are needed instead of loading both checkpoints; always for directories",
    )
    out_of_core.add_argument("--out-of-core", action="store_true", help="do so for files too")
    out_of_core.add_argument(
        "--dtype",
        metavar="TYPE",
        help="write floating point tensors in this type, such as bfloat16; by default their own",
    )
    out_of_core.add_argument("--device", help="device that computes the gain matrices (default: cpu)")
    out_of_core.add_argument(
        "--resume",
        action="store_true",
        help="continue from the journal of a killed run with the same arguments",
    )

    command = add_command(
        commands,
        "align-many",
        align_many_command,
        examples=(
            "align-many a.pt b.pt c.pt --model net.py:build --input-shape 2,3,32,32 --out b_aligned.pt c_aligned.pt",
        ),
    )
    command.add_argument("checkpoints", nargs="+", help="two or more checkpoints; the first keeps its order")
    add(
        command, "--model",
        help="callable that returns the network, or (network, example inputs). Without it, folders and files of diffusion models are "
        "aligned out of core, one after the other",
    )  # fmt: skip
    add(command, "--input-shape")
    command.add_argument(
        "--strategy", choices=(*PAIRWISE, *JOINT),
        help="match each checkpoint to the first (to-reference), to its aligned predecessor (chain), to the mean of the "
        "others in rounds (merge-many), or all at once (frank-wolfe); the last two match by weights, from the identity (default: "
        "merge-many, or to-reference without --model)",
    )  # fmt: skip
    add_matcher_options(command)
    command.add_argument(
        "--max-rounds", type=int, metavar="N",
        help="maximum number of rounds; of merge-many and frank-wolfe (default: 100)",
    )  # fmt: skip
    command.add_argument(
        "--max-steps", type=int, metavar="N",
        help="maximum number of Frank-Wolfe steps; of frank-wolfe (default: 50)",
    )  # fmt: skip
    add(
        command, "--out", nargs="+",
        help="one file for each checkpoint but the first, in their order; without --model a folder for all, or with --merge-all one output",
    )  # fmt: skip
    add(command, "--force")
    add_many_options(command)


def align_command(args: argparse.Namespace) -> None:
    """Align two checkpoints and write the second one aligned, or the merge of both; torchrun's ranks share the work."""
    with joined() as ranks, ranks.together(), speaking(ranks):
        _align_pair(args)


def _align_pair(args: argparse.Namespace) -> None:
    if args.merge is not None:
        check_fraction("--merge", args.merge)
    models = data = None
    if args.out_of_core or args.model is None or any(Path(path).is_dir() for path in (args.a, args.b)):
        alignment = _align_out_of_core(args, is_folder=Path(args.a).is_dir() and Path(args.b).is_dir())
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


def kept_by(args: argparse.Namespace) -> Path | None:
    """Return where ``align`` or ``align-many`` would keep what is solved for ``--resume``; None where nothing is kept."""
    from fastmatch.checkpoint.journal import journal_path

    if args.command == "align":
        return journal_path(args.out) if args.out else None
    return hidden(Path(args.out[0]), "many") if args.out and args.model is None else None


def _align_in_memory(
    args: argparse.Namespace,
) -> tuple[Alignment, tuple[nn.Module, nn.Module], Iterable[Any] | None]:
    """Return the alignment, both networks as they were before it, and the data of the report."""
    for option in ("dtype", "device", "resume"):
        if getattr(args, option):
            raise ValueError(f"--{option}: is an option of --out-of-core, which is not given")
    matcher_from(args, reads=False)
    check_outputs(args, out=STATE_SUFFIXES, permutations={".safetensors"}, report=PAGES)
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


def _align_out_of_core(args: argparse.Namespace, *, is_folder: bool) -> Alignment:
    """Return the alignment of two checkpoints whose tensors are read when they are needed."""
    from fastmatch.checkpoint import Checkpoint, WriteOptions, align_checkpoints
    from fastmatch.checkpoint.proof import LARGEST
    from fastmatch.checkpoint.same_model import check_is_model, check_same_sizes
    from fastmatch.checkpoint.tracing import is_diffusion, prove_checkpoint, trace_checkpoint

    if args.model is None and not is_folder:
        check_inputs(args)
        mixed = Path(args.a).is_dir() or Path(args.b).is_dir()
        for path in (args.a, args.b):
            check_is_model(Checkpoint(path))
        if mixed or not is_diffusion(args.b, Checkpoint(args.b)):
            raise ValueError(
                f"--model: needed unless both {args.a} and {args.b} are directories with a config.json, or files of a "
                f"diffusion model{in_a_folder(args.a)}"
            )
    if args.model is None and args.input_shape is not None:
        raise ValueError("--input-shape: needs --model; without it the inputs follow A's config.json")
    if args.no_verify:
        raise ValueError("--no-verify: alignment out of core does not verify; `fastmatch verify` does")
    if args.report_data is not None:
        raise ValueError("--report-data: alignment out of core does not run the networks")
    if args.balance:
        raise ValueError("--balance: has to run the networks, which alignment out of core does not")
    if args.matcher not in (None, "weights"):
        raise ValueError(
            f"--matcher: alignment out of core matches by weights, because {args.matcher} has to run the networks"
        )
    matcher = matcher_from(args)
    assert isinstance(matcher, WeightMatching)
    write = WriteOptions(args.merge, dtype_from(args.dtype), args.force, args.permutations)
    device = device_from(args.device)
    check_outputs(
        args, out=None if is_folder else STATE_SUFFIXES, permutations={".safetensors"}, report=PAGES
    )
    if args.model is None:
        checkpoint = Checkpoint(args.b)
        check_same_sizes(Checkpoint(args.a), checkpoint)
        traced = trace_checkpoint(args.b, checkpoint, unread=args.unread)
        proof = prove_checkpoint(args.b, checkpoint, traced)
    else:
        model, example = build_network(args)
        traced = PermutationSpec.trace(model, example, unread=args.unread)
        # A copy in float64 of a model that is aligned out of core may not fit.
        small = sum(t.numel() for t in model.parameters()) <= LARGEST
        proof = verify(model, traced, example) if small else None
    alignment = align_checkpoints(
        args.a,
        args.b,
        args.out,
        matcher,
        spec=selected(traced, args),
        write=write,
        device=device,
        resume=args.resume,
    )
    return replace(alignment, proof=proof)


def align_many_command(args: argparse.Namespace) -> None:
    """Align all checkpoints to the order of the first one and write the others."""
    if args.balance:
        raise ValueError("--balance: is for two networks; `fastmatch align` takes it")
    if args.model is None:
        align_many_on_disk(args, _summary, _record)
        return
    check_many_options(args)
    args.strategy = args.strategy or "merge-many"
    if len(args.out) != len(args.checkpoints) - 1:
        raise ValueError(
            f"--out: expected {len(args.checkpoints) - 1} files, one per checkpoint but the first, got {len(args.out)}"
        )
    _strategy_from(args, reads=False)
    check_outputs(args, out=STATE_SUFFIXES)
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


def _strategy_from(args: argparse.Namespace, *, reads: bool = True) -> Strategy:
    """Build the strategy that the options describe, with its matcher; see :func:`matcher_from`.

    Raises:
        ValueError: the strategy does not take an option that was given.
    """
    takes = {"max_rounds": list(JOINT), "max_steps": ["frank-wolfe"]}
    options = {name: getattr(args, name) for name in takes if getattr(args, name) is not None}
    for name in options:
        if args.strategy not in takes[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: is an option of --strategy {' or '.join(takes[name])}")
    if args.strategy in PAIRWISE:
        return PAIRWISE[args.strategy](matcher_from(args, reads=reads))
    if args.matcher not in (None, "weights"):
        raise ValueError(
            f"--matcher: --strategy {args.strategy} matches by weights; "
            f"{args.matcher} is for {' or '.join(PAIRWISE)}"
        )
    if args.init is None:
        args.init = "identity"  # where these strategies start
    matcher = matcher_from(args)
    assert isinstance(matcher, WeightMatching)
    return JOINT[args.strategy](matcher, **options)


def _summary(alignment: Alignment) -> str:
    """Return what was found as text: groups, moved units, objective, work, and how it ended."""
    matching = alignment.matching
    assert matching is not None
    total = sum(len(p) for p in alignment.permutations.values())
    limit = "--max-rounds" if matching.matcher in ROUNDS else "--max-sweeps"
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
