"""The command line: ``fastmatch align``, ``verify``, ``inspect``, ``renormalize``, ``curve``, ``partial``,
``demo``, ``study``, ``bench``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch.cli.bench import add_arguments as add_bench_arguments
from fastmatch.cli.several import add_arguments as add_several_arguments
from fastmatch.spec import PermutationSpec

__all__ = ["main"]


def callable_from(argument: str, option: str) -> Callable[[], Any]:
    """The function ``module:callable`` names, looked for in the current folder too."""
    module_name, colon, name = argument.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"{option}: expected module:callable, got {argument!r}")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise ValueError(f"{option}: no module {module_name!r} here or installed") from error
        raise
    finally:
        sys.path.remove(os.getcwd())
    builder = getattr(module, name, None)
    if not callable(builder):
        raise ValueError(f"{option}: {module_name!r} has no callable {name!r}")
    return builder


def build_model(argument: str) -> tuple[nn.Module, Any]:
    """(model, example inputs or None) from ``module:callable``.

    The callable takes no arguments and returns a module, or a pair of a module and its example inputs.
    """
    built = callable_from(argument, "--model")()
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {argument} returned {type(model).__name__}, expected a torch module")
    return model, example


def example_from(shape: str | None, built: Any) -> Any:
    """The example inputs: ``--input-shape`` as a random tensor, else what the builder gave."""
    if shape is None:
        if built is None:
            raise ValueError(
                "--input-shape: needed (such as 2,3,32,32) unless the callable returns (model, inputs)"
            )
        return built
    try:
        sizes = [int(part) for part in shape.replace("x", ",").split(",")]
    except ValueError as error:
        raise ValueError(f"--input-shape: expected whole numbers such as 2,3,32,32, got {shape!r}") from error
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def check_outputs(args: argparse.Namespace, *, folder: bool = False) -> None:
    """Refuses outputs of ``align`` that exist, share a file, or end in what could not be read back."""
    from fastmatch._internal.files import TORCH_SUFFIXES, check_format, check_target

    targets = [Path(args.out), *([Path(args.permutations)] if args.permutations else [])]
    if len({path.resolve() for path in targets}) < len(targets):
        raise ValueError(f"--permutations: {args.permutations} is the same file as --out; each needs its own")
    if not folder:
        check_format(targets[0], "--out", TORCH_SUFFIXES | {".safetensors"})
    for path in targets[1:]:
        check_format(path, "--permutations", {".safetensors"})
    for path in targets:
        check_target(path, force=args.force)


def align_command(args: argparse.Namespace) -> None:
    """Aligns two checkpoints and writes the second one aligned, or the merge of both."""
    if args.streamed or args.model is None or any(Path(path).is_dir() for path in (args.a, args.b)):
        from fastmatch.cli.checkpoint import align_streamed

        align_streamed(args)
        return
    for option in ("dtype", "device", "resume"):
        if getattr(args, option):
            raise ValueError(f"--{option}: for files needs --streamed")
    import copy

    from fastmatch._internal.files import load_state, save_state
    from fastmatch._internal.states import check_finite, check_same_architecture, state_of
    from fastmatch.matching.activations import ActivationMatching
    from fastmatch.matching.align import align
    from fastmatch.matching.fisher import FisherMatching
    from fastmatch.matching.straight_through import StraightThrough
    from fastmatch.matching.weights import WeightMatching
    from fastmatch.merging.average import merge_states
    from fastmatch.permutations.alignment import Alignment

    check_outputs(args)
    out = Path(args.out)
    model, built = build_model(args.model)
    example = example_from(args.input_shape, built)
    states = [load_state(path) for path in (args.a, args.b)]
    for path, state in zip((args.a, args.b), states, strict=True):
        check_same_architecture(state_of(model, "--model"), state, "--model", path)
    check_same_architecture(states[0], states[1], args.a, args.b)
    for path, state in zip((args.a, args.b), states, strict=True):
        check_finite(state, path)
    # The file's own dtypes stay: only the traced and verified copy takes the builder's.
    model_b = copy.deepcopy(model)
    model.load_state_dict(states[0])
    model_b.load_state_dict(states[1])
    spec = PermutationSpec.trace(model, example)
    if not spec.groups:
        raise ValueError(f"--model: nothing in {args.model} can be permuted; see `fastmatch inspect`")
    if not args.no_verify:
        from fastmatch.permutations.verify import verify

        verify(model_b, spec, example)
    matched = spec if args.groups is None else spec.select(args.groups)
    matched = matched if args.residual else matched.without_residual()
    weights = WeightMatching(max_sweeps=args.max_sweeps, include=args.include, seed=args.seed)
    if args.data:
        from fastmatch.cli.renormalize import loader_of

        data = loader_of(callable_from(args.data, "--data"), "--data")
        matcher = {
            "weights": lambda: weights,
            "fisher": lambda: FisherMatching(data, weights),
            "straight-through": lambda: StraightThrough(data, projection=weights),
        }.get(args.method, lambda: ActivationMatching(data, args.similarity))()
        found = align(model, model_b, matcher=matcher, spec=matched)
    elif args.method not in (None, "weights"):
        raise ValueError(f"--data: --method {args.method} needs a loader, as module:callable")
    else:
        found = align(states[0], states[1], matcher=weights, spec=matched)
    alignment = Alignment(found.permutations, spec, found.matching)
    result = alignment.apply(states[1])
    if args.merge is not None:
        result = merge_states([states[0], result], [1 - args.merge, args.merge])
    save_state(result, out, force=args.force)
    if args.permutations:
        alignment.save(args.permutations, force=args.force)
    matching = found.matching
    assert matching is not None
    moved = sum(int((p != torch.arange(len(p))).sum()) for p in alignment.permutations.values())
    total = sum(len(p) for p in alignment.permutations.values())
    print(
        f"{len(spec.groups)} groups, {moved} of {total} units moved; objective {matching.objective[0]:.6g} -> "
        f"{matching.objective[-1]:.6g} in {matching.sweeps} sweeps, {matching.solves} assignments; wrote {out}"
    )
    if not matching.converged:
        print(f"not converged after {matching.sweeps} sweeps: raise --max-sweeps to go on", file=sys.stderr)


def verify_command(args: argparse.Namespace) -> None:
    """Runs two checkpoints on the same random inputs and compares their outputs."""
    from fastmatch.cli.checkpoint import verify_paths

    model, example = None, None
    if args.model is not None:
        model, built = build_model(args.model)
        example = example_from(args.input_shape, built)
    verify_paths(args, model, example)


def inspect_command(args: argparse.Namespace) -> None:
    """Prints the traced permutation groups of a model, and what is pinned by which operation."""
    model, built = build_model(args.model)
    spec = PermutationSpec.trace(model, example_from(args.input_shape, built))
    print(spec.to_json() if args.json else spec.table())


def demo_command(args: argparse.Namespace) -> None:
    """Trains, aligns, merges and renormalizes small nets on digits."""
    from fastmatch.studies.demo import run

    run(args.width, args.out, seed=args.seed)


def renormalize_command(args: argparse.Namespace) -> None:
    """Renormalizes a merged or pruned checkpoint on the user's data."""
    from fastmatch.cli.renormalize import loader_of, renormalize_file

    model, _ = build_model(args.model)
    data = loader_of(callable_from(args.data, "--data"), "--data")
    print(
        renormalize_file(
            model, args.checkpoint, args.endpoints, data, args.out, method=args.method, weights=args.weights,
            mode=args.mode, samples=args.samples, force=args.force,
        )
    )  # fmt: skip


def curve_command(args: argparse.Namespace) -> None:
    """Evaluates the line between two checkpoints."""
    from fastmatch.cli.renormalize import curve_files, loader_of

    model, _ = build_model(args.model)
    data = loader_of(callable_from(args.data, "--data"), "--data")
    calibration = args.calibration and loader_of(
        callable_from(args.calibration, "--calibration"), "--calibration"
    )
    print(
        curve_files(
            model, args.a, args.b, data, args.out, points=args.points, method=args.renormalize,
            calibration=calibration, mode=args.mode, samples=args.samples, plot=args.plot, force=args.force,
        )
    )  # fmt: skip


def partial_command(args: argparse.Namespace) -> None:
    """Merges checkpoints from a layer on and writes the result as an exported program."""
    from fastmatch.cli.partial import merge_files
    from fastmatch.cli.renormalize import loader_of

    model, built = build_model(args.model)
    data = args.data and loader_of(callable_from(args.data, "--data"), "--data")
    print(
        merge_files(
            model, example_from(args.input_shape, built), args.checkpoints, data, args.out, rule=args.rule,
            start_at=args.keep if args.start_at is None else args.start_at, apart=args.apart,
            weights=args.weights, method=args.renormalize, force=args.force,
        )
    )  # fmt: skip


def study_command(args: argparse.Namespace) -> None:
    """Measures the paper's claims in small and prints how each fares."""
    from fastmatch.cli.study import datasets, summary
    from fastmatch.studies.paper import run

    data = None if args.data == "digits" else datasets(callable_from(args.data, "--data"), args.data)
    record = run(
        args.out, data=data, networks=args.networks, widths=args.widths, seeds=args.seeds, points=args.points,
        epochs=args.epochs,
    )  # fmt: skip
    print(summary(record, args.out))


def _calibration_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--mode", default="joint", choices=("joint", "sequential"))
    command.add_argument("--samples", type=int, help="calibrate on the first so many samples")
    command.add_argument("--force", action="store_true", help="replace output files that exist")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(
        prog="fastmatch", description="Align, merge and renormalize networks of the same architecture."
    )
    commands = root.add_subparsers(dest="command", required=True)

    command = commands.add_parser("align", help="align checkpoint B to checkpoint A, by weights or on data")
    command.add_argument(
        "a", help="reference: .safetensors, a torch file of tensors, or a Hugging Face directory"
    )
    command.add_argument("b", help="the checkpoint to permute")
    command.add_argument(
        "--model", help="module:callable that builds the network; a directory's config.json needs none"
    )
    command.add_argument("--input-shape", help="shape of an example input, such as 2,3,32,32")
    command.add_argument(
        "--out", required=True, help="what to write: .safetensors, .pt, .pth or .bin, or a directory"
    )
    command.add_argument(
        "--merge", type=float, metavar="W", help="write (1 - W) A + W B instead of aligned B"
    )
    command.add_argument("--permutations", help="also write permutations and spec to this .safetensors file")
    command.add_argument(
        "--data",
        help="module:callable that returns a loader: activations are matched, unless --method says else",
    )
    command.add_argument(
        "--method", choices=("weights", "activations", "fisher", "straight-through"), help="how to match"
    )
    command.add_argument(
        "--similarity",
        default="correlation",
        choices=("correlation", "covariance", "inner", "batch-correlation", "cca"),
        help="of activations",
    )
    command.add_argument("--groups", nargs="+", help="match only these groups")
    command.add_argument(
        "--no-residual", dest="residual", action="store_false", help="leave residual streams where they are"
    )
    command.add_argument("--include", default="affine", choices=("weights", "affine", "statistics"))
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--max-sweeps", type=int, default=100)
    command.add_argument(
        "--no-verify", action="store_true", help="do not prove that B's function is unchanged"
    )
    command.add_argument("--force", action="store_true", help="replace output files that exist")
    command.add_argument(
        "--streamed", action="store_true", help="files: read tensors when they are needed, as of directories"
    )
    command.add_argument("--dtype", help="streamed: write in this type, such as bfloat16")
    command.add_argument("--device", help="streamed: where gains are computed, the CPU where left out")
    command.add_argument(
        "--resume", action="store_true", help="streamed: go on from the journal of a killed run"
    )
    command.set_defaults(run=align_command)

    command = commands.add_parser("verify", help="prove that two checkpoints are the same function")
    command.add_argument("a", help="a Hugging Face directory, or a file (then with --model)")
    command.add_argument("b", help="the other one")
    command.add_argument("--model", help="module:callable that builds the network")
    command.add_argument("--input-shape", help="shape of an example input, such as 2,3,32,32")
    command.add_argument("--dtype", default="float64", help="type to compute in")
    command.add_argument("--tolerance", type=float, default=1e-9, help="largest relative difference")
    command.set_defaults(run=verify_command)

    command = commands.add_parser("inspect", help="print a network's permutation groups and pinned axes")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument("--input-shape", help="shape of an example input, such as 2,3,32,32")
    command.add_argument("--json", action="store_true", help="print the spec as JSON instead of a table")
    command.set_defaults(run=inspect_command)

    command = commands.add_parser("demo", help="train, align, merge and renormalize small nets on digits")
    command.add_argument("--width", type=int, default=1024, help="width of the MLPs, 128 to 8192")
    command.add_argument("--out", default="out", help="folder for the picture and the numbers")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=demo_command)

    command = commands.add_parser(
        "renormalize", help="give a merged or pruned checkpoint its statistics back"
    )
    command.add_argument("checkpoint", help="the merge, or the pruned model")
    command.add_argument(
        "--endpoints", nargs="+", default=[], help="the checkpoints merged, aligned; or the dense one"
    )
    command.add_argument("--weights", nargs="+", type=float, help="those of the merge, one an endpoint")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument("--data", required=True, help="module:callable that returns a loader")
    command.add_argument(
        "--method", default="auto", choices=("auto", "repair", "rescale", "reshift", "reset")
    )
    command.add_argument("--out", required=True, help="file to write: .safetensors, .pt, .pth or .bin")
    _calibration_arguments(command)
    command.set_defaults(run=renormalize_command)

    command = commands.add_parser("curve", help="loss, top-1 and top-5 on the line between two checkpoints")
    command.add_argument("a", help="the checkpoint at lambda 0")
    command.add_argument("b", help="the checkpoint at lambda 1, aligned")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument(
        "--data", required=True, help="module:callable that returns a loader of (inputs, targets)"
    )
    command.add_argument("--points", type=int, default=11)
    command.add_argument("--renormalize", metavar="METHOD", help="renormalize between the ends")
    command.add_argument("--calibration", help="module:callable that returns the loader to renormalize on")
    command.add_argument("--out", required=True, help="CSV file to write")
    command.add_argument("--plot", help="also draw it: .png, .svg or .pdf")
    _calibration_arguments(command)
    command.set_defaults(run=curve_command)

    command = commands.add_parser(
        "partial", help="merge checkpoints from a layer on; keep those before apart"
    )
    command.add_argument("checkpoints", nargs="+", help="two or more of one architecture")
    command.add_argument("--model", required=True, help="module:callable that builds the network")
    command.add_argument("--input-shape", help="shape of an example input, such as 2,3,32,32")
    command.add_argument("--data", help="module:callable that returns a loader")
    command.add_argument("--rule", default="permute", choices=("identity", "permute", "zip", "cca"))
    start = command.add_mutually_exclusive_group()
    start.add_argument("--start-at", help="the group that is merged first, see `fastmatch inspect`")
    start.add_argument("--keep", type=int, default=0, help="or how many groups before it stay apart")
    command.add_argument("--apart", nargs="+", default=[], help="further groups that stay apart")
    command.add_argument("--weights", nargs="+", type=float, help="one a checkpoint, of sum one")
    command.add_argument("--renormalize", metavar="METHOD", help="repair, rescale, reshift or reset after")
    command.add_argument("--out", required=True, help="file to write: .pt2, for torch.export.load")
    command.add_argument("--force", action="store_true", help="replace output files that exist")
    command.set_defaults(run=partial_command)

    command = commands.add_parser(
        "study", help="the paper's claims in small: one HTML report, claim by claim"
    )
    command.add_argument("--out", default="study", help="folder for study.html, study.json and study.png")
    command.add_argument(
        "--data",
        default="digits",
        help="digits, or module:callable that returns (train, test) torch datasets",
    )
    command.add_argument("--networks", nargs="+", help="some of the study's networks, such as 'VGG, BN'")
    command.add_argument("--widths", nargs="+", type=int, default=[1, 2, 4, 8])
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--points", type=int, default=7, help="positions on a curve, odd")
    command.add_argument("--epochs", type=int, help="of training, instead of each network's own")
    command.set_defaults(run=study_command)
    add_several_arguments(commands)
    add_bench_arguments(commands.add_parser("bench", help="run the benchmarks of a checkout and draw them"))
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 2 with a line on standard error where the input is at fault."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"fastmatch {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
