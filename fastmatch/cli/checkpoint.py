"""``fastmatch align`` for what is streamed, and ``fastmatch verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch.checkpoint.align import align_checkpoints
from fastmatch.checkpoint.verify import verify_checkpoints
from fastmatch.spec import PermutationSpec

__all__ = ["align_streamed", "verify_paths"]


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype: expected a floating point type such as bfloat16, got {name!r}")
    return dtype


def align_streamed(args: argparse.Namespace) -> None:
    """Aligns two directories or files tensor by tensor."""
    from fastmatch.cli.main import build_model, check_outputs, example_from

    folder = Path(args.a).is_dir() and Path(args.b).is_dir()
    if args.model is None and not folder:
        raise ValueError(
            f"--model: needed unless both {args.a} and {args.b} are directories with a config.json"
        )
    check_outputs(args, folder=folder)
    spec: PermutationSpec | None = None
    if args.model is not None:
        model, built = build_model(args.model)
        spec = PermutationSpec.trace(model, example_from(args.input_shape, built))
    alignment = align_checkpoints(
        args.a, args.b, args.out, spec=spec, groups=args.groups, residual=args.residual, merge=args.merge, dtype=_dtype(args.dtype),
        device=args.device or "cpu", resume=args.resume, seed=args.seed, max_sweeps=args.max_sweeps,
        include=args.include, force=args.force,
    )  # fmt: skip
    if args.permutations:
        alignment.save(args.permutations, force=args.force)
    matching = alignment.matching
    assert matching is not None
    state = "converged" if matching.converged else "not converged, raise --max-sweeps"
    print(
        f"{len(alignment.permutations)} groups; objective {matching.objective[0]:.6g} -> "
        f"{matching.objective[-1]:.6g} in {matching.sweeps} sweeps, {matching.solves} assignments ({state}); "
        f"wrote {args.out}"
    )


def verify_paths(args: argparse.Namespace, model: nn.Module | None, example: Any) -> None:
    """Compares two checkpoints; the model is built from the first one's config.json where none is given."""
    found = verify_checkpoints(
        args.a, args.b, model=model, example_inputs=example,
        dtype=_dtype(args.dtype) or torch.float64, tolerance=args.tolerance,
    )  # fmt: skip
    print(f"the same function: {found.outputs} outputs agree within {found.error:.2g} relative")
