"""The work of ``fastmatch renormalize``, once its options are checked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.coefficients import check_merged_from
from fastmatch._internal.files import load_state, shared_metadata
from fastmatch._internal.model_files import named_for, with_names_of
from fastmatch.cli.loading import build_model, function_from, load_into
from fastmatch.cli.outputs import say
from fastmatch.cli.reports import report_data, write_report
from fastmatch.cli.writing import write_weights
from fastmatch.renorm import Renormalization, applied_plan, renormalize
from fastmatch.renorm.plan import candidates

__all__ = ["renormalize_checkpoint"]


def renormalize_checkpoint(args: argparse.Namespace) -> None:
    """Renormalize a checkpoint and write it."""
    options = Renormalization(args.method, args.mode or "joint", args.samples)
    measured = report_data(args)
    model, _ = build_model(args.model)
    data = loader_from(args.data, "--data")
    merged = load_into(model, args.checkpoint)
    endpoints = [load_into(model, path) for path in args.endpoints]
    if not endpoints and options.method != "reset" and "reset" not in candidates(merged, options):
        raise ValueError(f"--endpoints: needed for method {options.method!r}")
    if len(endpoints) > 1 and args.weights is not None and not args.other_endpoints:
        _check_merge(args, merged, endpoints)
    forward = function_from(args.forward, "--forward", default_forward)
    if options.method == "reset":
        new = renormalize(merged, None, data, options, forward=forward)
    else:
        new = renormalize(merged, endpoints or None, data, options, weights=args.weights, forward=forward)
    state = with_names_of(new.state_dict(), args.checkpoint, new)
    write_weights(state, args.out, force=args.force, metadata=shared_metadata([args.checkpoint]))
    plan = applied_plan(new)
    assert plan is not None
    say(
        args,
        f"{plan}\nwrote {args.out}",
        method=plan.method,
        why=plan.why,
        layers=list(plan.layers),
        left_alone=dict(plan.left_alone),
        kept=dict(plan.kept),
        new_parameters=list(plan.added),
        out=args.out,
        report=args.report,
    )
    if args.report is not None:
        from fastmatch.report.merge import merge_report

        report = merge_report(
            merged, endpoints, data if measured is None else measured, renormalized=new, weights=args.weights,
            names=args.endpoints, forward=forward,
        )  # fmt: skip
        write_report(report, args)


def _check_merge(args: argparse.Namespace, merged: nn.Module, endpoints: Sequence[nn.Module]) -> None:
    """Refuse endpoints or weights that are not those of the merge; a file has no note of them, as a module of the library has."""
    paths = [args.checkpoint, *args.endpoints]
    stored = [_floating_types(named_for(merged, load_state(path, mmap=True), path)) for path in paths]
    try:
        check_merged_from(merged, endpoints, args.endpoints, args.weights, stored)
    except ValueError as error:
        raise ValueError(
            f"--endpoints: {error}. Give the aligned files and the --weights of the merge, or --other-endpoints if this is meant: a merge "
            "made in another way, or renormalized before"
        ) from None


def _floating_types(state: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in state.items() if tensor.is_floating_point()}
