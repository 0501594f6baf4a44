"""``fastmatch align-many`` without a network: folders and files of diffusion models, one after the other."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmatch.cli.loading import in_a_folder
from fastmatch.cli.matchers import matcher_from
from fastmatch.cli.options import device_from, dtype_from
from fastmatch.cli.outputs import say
from fastmatch.cli.work.merge_on_disk import blocks_from
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment

__all__ = ["align_many_on_disk"]


def align_many_on_disk(
    args: argparse.Namespace,
    summary: Callable[[Alignment], str],
    record: Callable[[Alignment], dict[str, Any]],
) -> None:
    """Align the checkpoints and write the others, or the merge of all.

    Args:
        summary, record: what is said of an alignment, in words and for ``--json``.
    """
    from fastmatch.checkpoint import Checkpoint, MergeOptions, WriteOptions, align_many_checkpoints
    from fastmatch.checkpoint.tracing import is_diffusion

    paths = args.checkpoints
    for path in paths:
        if not Path(path).is_dir() and not is_diffusion(path, Checkpoint(path)):
            raise ValueError(
                f"--model: needed unless all are folders with a config.json, or files of a diffusion model; {path} is neither"
                f"{in_a_folder(path)}"
            )
    matcher = matcher_from(args)
    assert isinstance(matcher, WeightMatching)
    reference = 0 if args.reference in (None, "first") else paths.index(args.reference)
    merge = None
    if args.merge_all:
        merge = MergeOptions(args.weights, blocks_from(args.block_weights, Checkpoint(paths[reference])))
    found = align_many_checkpoints(
        paths, args.out[0], matcher, reference=reference, merge=merge, device=device_from(args.device),
        write=WriteOptions(dtype=dtype_from(args.dtype), force=args.force), resume=args.resume,
    )  # fmt: skip
    lines, records = [], []
    for k, (path, alignment) in enumerate(zip(paths, found, strict=True)):
        if k != reference:
            lines.append(f"{path}: {summary(alignment) if alignment.matching else repr(alignment)}")
            records.append({"checkpoint": path, **record(alignment)})
    say(args, "\n".join([*lines, f"wrote {args.out[0]}"]), alignments=records, out=args.out[0])
