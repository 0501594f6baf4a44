"""The work of ``fastmatch merge`` and ``partial``, once their options are checked."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.files import shared_metadata, writing
from fastmatch._internal.model_files import with_names_of
from fastmatch._internal.states import check_finite
from fastmatch._internal.torch_file import torch_sink
from fastmatch.cli.loading import build_model, example_from, function_from, load_into, load_models
from fastmatch.cli.outputs import say
from fastmatch.cli.reports import report_data, write_report
from fastmatch.cli.writing import write_weights
from fastmatch.merging.average import merge
from fastmatch.merging.ensemble import model_cost
from fastmatch.merging.partial import merge_partial
from fastmatch.merging.unit_rules import CCA, Identity, Permute, Zip
from fastmatch.renorm import renormalize
from fastmatch.spec.running import arguments_of

__all__ = ["merge_networks", "merge_partially"]

RULES = {"permute": Permute, "zip": Zip, "cca": CCA}
"""The words of ``--rule`` that match units on data."""


def merge_networks(args: argparse.Namespace) -> None:
    """Average checkpoints that are aligned already."""
    data = report_data(args)
    models = load_models(args)
    merged = merge(models, args.weights, biases=args.biases)
    state = with_names_of(merged.state_dict(), args.checkpoints[0], merged)
    write_weights(state, args.out, force=args.force, metadata=shared_metadata(args.checkpoints))
    text = f"{len(models)} checkpoints, biases: {args.biases}; wrote {args.out}"
    say(args, text, checkpoints=len(models), biases=args.biases, out=args.out, report=args.report)
    if args.report is not None:
        from fastmatch.report.merge import merge_report

        write_report(merge_report(merged, models, data, names=args.checkpoints), args)


def merge_partially(args: argparse.Namespace) -> None:
    """Merge checkpoints from a layer on and write the result as an exported program."""
    built = [build_model(name) for name in args.model]
    example = example_from(args.input_shape, built[0][1])
    data = [] if args.data is None else loader_from(args.data, "--data")
    networks = [network for network, _ in built] * (len(args.checkpoints) if len(built) == 1 else 1)
    models = [load_into(network, path) for network, path in zip(networks, args.checkpoints, strict=True)]
    forward = function_from(args.forward, "--forward", default_forward)
    rule = RULES[args.rule](data, forward=forward) if args.rule in RULES else Identity()
    start_at = args.keep if args.start_at is None else args.start_at
    found = merge_partial(
        models, example, rule, start_at=start_at, stop_at=args.stop_at, apart=args.apart, weights=args.weights
    )
    merged: nn.Module = found.model
    if args.renormalize is not None:
        endpoints = None
        if args.renormalize != "reset":
            endpoints = found.endpoint_statistics(models, data, forward=forward)
        merged = renormalize(merged, endpoints, data, args.renormalize, forward=forward)
    check_finite(merged.state_dict(), f"{args.out} is not written: the result")
    _export(merged, example, args.out, force=args.force)
    single, cost = model_cost(models[0], example), model_cost(merged, example)
    flops = f", {cost.flops / single.flops:.2f} times the FLOPs" if single.flops else ""
    say(
        args,
        f"{len(found.merged)} of {len(found.spec.groups)} groups merged by {args.rule}; {cost.parameters} parameters, "
        f"{cost.parameters / single.parameters:.2f} times one model's{flops}; wrote {args.out}",
        merged=list(found.merged),
        groups=len(found.spec.groups),
        rule=args.rule,
        parameters=cost.parameters,
        parameter_ratio=cost.parameters / single.parameters,
        flops_ratio=cost.flops / single.flops if single.flops else None,
        out=args.out,
    )


def _export(model: nn.Module, example_inputs: Any, out: str, *, force: bool) -> None:
    """Write a model as an exported program, with every first dimension dynamic where its operations allow that."""
    args, kwargs = arguments_of(example_inputs, None)

    def dynamic(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.ndim else None

    shapes = (*map(dynamic, args), *map(dynamic, kwargs.values()))
    program = torch.export.export(model.eval(), args, kwargs or None, dynamic_shapes=shapes)
    buffer = io.BytesIO()  # torch cannot export into a file that fails
    torch.export.save(program, buffer)
    with writing(out, force=force) as temporary, torch_sink(temporary, Path(out)) as file:
        file.write(buffer.getbuffer())
