"""``fastmatch merge`` and ``partial``: merge checkpoints completely, or from a layer on."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.files import STATE_SUFFIXES, shared_metadata, writing
from fastmatch._internal.model_files import with_names_of
from fastmatch._internal.states import check_finite
from fastmatch._internal.torch_file import torch_sink
from fastmatch.cli.loading import build_model, example_from, function_from, load_into, load_models
from fastmatch.cli.merge_on_disk import add_merge_options, merge_on_disk
from fastmatch.cli.options import Commands, add, add_command
from fastmatch.cli.outputs import check_outputs, say, write_weights
from fastmatch.cli.reports import PAGES, report_data, write_report
from fastmatch.merging.average import Biases, merge
from fastmatch.merging.ensemble import model_cost
from fastmatch.merging.partial import merge_partial
from fastmatch.merging.unit_rules import CCA, Identity, Permute, Zip
from fastmatch.renorm import renormalize
from fastmatch.renorm.options import Method
from fastmatch.spec.running import arguments_of

__all__ = ["add_commands"]

MATCHED_RULES = {"permute": Permute, "zip": Zip, "cca": CCA}
"""The rules that match units on data."""


def add_commands(commands: Commands) -> None:
    """Add the commands to the grammar."""
    command = add_command(
        commands, "merge", merge_command,
        examples=("merge a.pt b_aligned.pt --model net.py:build --weights 0.3 0.7 --out merged.pt",),
    )  # fmt: skip
    command.add_argument("checkpoints", nargs="+", help="one or more aligned checkpoints")
    add(
        command, "--model",
        help="callable that returns the network; needed for --biases and --report, and for one checkpoint. Without it, files and "
        "folders are merged tensor by tensor",
    )  # fmt: skip
    add(command, "--weights")
    add_merge_options(command)
    command.add_argument(
        "--biases", choices=get_args(Biases), default="average",
        help="average them; scale them down like the activations of a merge (normalize); or set them to zero (remove)",
    )  # fmt: skip
    add(command, "--out", "--force", "--report", "--report-data")

    command = add_command(
        commands, "partial", partial_command,
        examples=(
            "partial a.pt b.pt --model net.py:build --input-shape 2,3,32,32 --data net.py:loader --rule zip --keep 2 "
            "--out merged.pt2",
            "partial a.pt b.pt --model net.py:ten_classes --model net.py:five_classes --input-shape 2,3,32,32 --data net.py:loader "
            "--rule zip --stop-at 6 --out shared.pt2",
        ),
    )  # fmt: skip
    command.add_argument(
        "checkpoints",
        nargs="+",
        help="two or more checkpoints of one architecture, but for their heads with --stop-at",
    )
    add(
        command, "--model", required=True, action="append",
        help="callable that returns the network, or (network, example inputs); given once, or once for each checkpoint if their heads "
        "differ (see --stop-at)",
    )  # fmt: skip
    add(command, "--input-shape")
    add(
        command, "--data",
        help="callable that returns a loader; needed by all rules but identity, and by --renormalize",
    )  # fmt: skip
    add(command, "--forward")
    command.add_argument(
        "--rule",
        default="permute",
        choices=("identity", *MATCHED_RULES),
        help="which units are merged into one",
    )
    start = command.add_mutually_exclusive_group()
    start.add_argument(
        "--start-at", metavar="GROUP", help="the first group that is merged, named by `fastmatch inspect`"
    )
    start.add_argument("--keep", type=int, default=0, metavar="N", help="or the number of groups kept apart")
    command.add_argument(
        "--stop-at", metavar="GROUP",
        help="the last group that is merged: the layers after it stay apart, and the program returns the output of every network; for "
        "networks of different tasks",
    )  # fmt: skip
    command.add_argument("--apart", nargs="+", default=[], metavar="GROUP", help="further groups kept apart")
    add(
        command,
        "--weights",
        help="merge coefficients, one per checkpoint, positive and of sum one; equal by default",
    )
    add(
        command,
        "--renormalize",
        choices=[word for word in get_args(Method) if word not in ("auto", "least-squares")],
    )
    add(command, "--out", help="file to write: .pt2, for torch.export.load")
    add(command, "--force")


def merge_command(args: argparse.Namespace) -> None:
    """Average checkpoints that are aligned already."""
    if args.model is None:
        merge_on_disk(args)
        return
    for option in ("block_weights", "add_difference", "dtype"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: merges on disk, without --model")
    check_weights(args.weights, len(args.checkpoints))
    check_outputs(args, out=STATE_SUFFIXES, report=PAGES)
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


def partial_command(args: argparse.Namespace) -> None:
    """Merge checkpoints from a layer on and write the result as an exported program."""
    if args.data is None and args.rule in MATCHED_RULES:
        raise ValueError(f"--data: needed by --rule {args.rule}")
    if args.data is None and args.renormalize is not None:
        raise ValueError(f"--data: needed by --renormalize {args.renormalize}")
    if args.data is not None and args.rule == "identity" and args.renormalize is None:
        raise ValueError("--data: --rule identity reads none; it is for another rule or --renormalize")
    if args.data is None and args.forward is not None:
        raise ValueError("--forward: runs the networks on --data, which is not given")
    if len(args.model) not in (1, len(args.checkpoints)):
        raise ValueError(
            f"--model: expected one, or one for each of the {len(args.checkpoints)} checkpoints; got {len(args.model)}"
        )
    check_weights(args.weights, len(args.checkpoints))
    check_outputs(args, out={".pt2"})
    built = [build_model(name) for name in args.model]
    example = example_from(args.input_shape, built[0][1])
    data = [] if args.data is None else loader_from(args.data, "--data")
    networks = [network for network, _ in built] * (len(args.checkpoints) if len(built) == 1 else 1)
    models = [load_into(network, path) for network, path in zip(networks, args.checkpoints, strict=True)]
    forward = function_from(args.forward, "--forward", default_forward)
    rule = MATCHED_RULES[args.rule](data, forward=forward) if args.rule in MATCHED_RULES else Identity()
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
