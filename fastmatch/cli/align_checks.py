"""What is wrong with the options of ``align`` and ``align-many``, told before torch is loaded as far as that is possible."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmatch._internal.allowed import PAGES, STATE_SUFFIXES
from fastmatch._internal.checks import check_format, check_fraction, check_integer
from fastmatch.cli.options import check_matcher, device_from, dtype_from
from fastmatch.cli.outputs import check_inputs, check_outputs

__all__ = ["JOINT", "PAIRWISE", "check_align", "check_align_many", "is_out_of_core"]

PAIRWISE = ("to-reference", "chain")
"""The words of ``--strategy`` that match two networks at a time."""

JOINT = ("merge-many", "frank-wolfe")
"""The words of ``--strategy`` that match all networks at once, by weights."""

ROUNDS = {"max_rounds": JOINT, "max_steps": ("frank-wolfe",)}
"""Options of strategies -> the strategies that take them."""

ONLY_ON_DISK = ("reference", "merge_all", "weights", "block_weights", "dtype", "device", "resume")
"""Options of ``align-many`` without ``--model``."""


def is_out_of_core(args: argparse.Namespace) -> bool:
    """Return whether ``align`` reads tensors when they are needed: if that is asked for, without a network, and for folders."""
    return args.out_of_core or args.model is None or any(Path(path).is_dir() for path in (args.a, args.b))


def check_align(args: argparse.Namespace) -> None:
    """Raise if an option of ``align`` is out of range or does not fit the others, an input is missing or an output exists."""
    if args.merge is not None:
        check_fraction("--merge", args.merge)
    if is_out_of_core(args):
        _check_out_of_core(args)
        return
    for option in ("dtype", "device", "resume"):
        if getattr(args, option):
            raise ValueError(f"--{option}: is an option of --out-of-core, which is not given")
    check_matcher(args)
    check_outputs(args, out=STATE_SUFFIXES, permutations={".safetensors"}, report=PAGES)


def _check_out_of_core(args: argparse.Namespace) -> None:
    is_folder = Path(args.a).is_dir() and Path(args.b).is_dir()
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
    check_matcher(args)
    dtype_from(args.dtype)
    device_from(args.device)
    if args.model is None and not is_folder:
        check_inputs(args)
        from fastmatch.cli.work.structure import check_structure

        check_structure(args)
    suffixes = None if is_folder else STATE_SUFFIXES
    check_outputs(args, out=suffixes, permutations={".safetensors"}, report=PAGES)


def check_align_many(args: argparse.Namespace) -> None:
    """Raise if an option of ``align-many`` is out of range or does not fit the others, or an input is missing.

    With ``--model``, an output that exists is refused too; without it, the library does that.
    """
    if args.balance:
        raise ValueError("--balance: is for two networks; `fastmatch align` takes it")
    if args.model is None:
        _check_many_on_disk(args)
        return
    for option in ONLY_ON_DISK:
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')}: is for checkpoints out of core, without --model")
    args.strategy = args.strategy or "merge-many"
    if len(args.out) != len(args.checkpoints) - 1:
        raise ValueError(
            f"--out: expected {len(args.checkpoints) - 1} files, one per checkpoint but the first, got {len(args.out)}"
        )
    _check_strategy(args)
    check_outputs(args, out=STATE_SUFFIXES)


def _check_strategy(args: argparse.Namespace) -> None:
    for name, strategies in ROUNDS.items():
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value is not None and args.strategy not in strategies:
            raise ValueError(f"{option}: is an option of --strategy {' or '.join(strategies)}")
        if value is not None:
            check_integer(option, value, least=1)
    if args.strategy in JOINT and args.matcher not in (None, "weights"):
        raise ValueError(
            f"--matcher: --strategy {args.strategy} matches by weights; "
            f"{args.matcher} is for {' or '.join(PAIRWISE)}"
        )
    check_matcher(args)


def _check_many_on_disk(args: argparse.Namespace) -> None:
    if len(args.out) != 1:
        raise ValueError("--out: expected one folder, or one output of --merge-all, without --model")
    if args.strategy not in (None, "to-reference"):
        raise ValueError(f"--strategy: {args.strategy} needs --model; out of core it is to-reference")
    for option in ("input_shape", "max_rounds", "max_steps"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: needs --model")
    if args.matcher not in (None, "weights"):
        raise ValueError(
            f"--matcher: alignment out of core matches by weights; {args.matcher} has to run the networks"
        )
    if args.reference not in (None, "first", *args.checkpoints):
        raise ValueError(f"--reference: expected 'first' or one of the checkpoints, got {args.reference!r}")
    for option in ("weights", "block_weights"):
        if getattr(args, option) is not None and not args.merge_all:
            raise ValueError(f"--{option.replace('_', '-')}: is an option of --merge-all, which is not given")
    check_matcher(args)
    check_inputs(args)
    kept = args.checkpoints[0] if args.reference in (None, "first") else args.reference
    if args.merge_all and not Path(kept).is_dir():
        check_format(args.out[0], "--out", STATE_SUFFIXES)
