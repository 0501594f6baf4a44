"""Merge checkpoints on disk in one pass: every tensor of every file is read once, and one is in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmatch._internal.coefficients import check_weights, is_one, warn_of_scale
from fastmatch._internal.computed_weights import check_equal_parts, fixed_parts
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import check_finite, check_same_architecture, working_dtype
from fastmatch.checkpoint.align import metadata_of
from fastmatch.checkpoint.blocks import Blocks, coefficients_by_name
from fastmatch.checkpoint.differences import log_differences
from fastmatch.checkpoint.diffusion.components import UNUSED
from fastmatch.checkpoint.inputs import LATENT, differ_in_inputs, with_more_inputs
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.same_model import check_same_type
from fastmatch.checkpoint.scaled import check_unscaled
from fastmatch.checkpoint.tracing import take_names, take_tied_names
from fastmatch.checkpoint.writer import write_like

__all__ = ["MergeOptions", "Tensors", "merge_checkpoints", "write_merge"]

log = logging.getLogger("fastmatch")

FEW = 4
"""Tensors that may have another size: a head has a weight and a bias, an inpainting UNet one wider kernel."""


@dataclass(frozen=True)
class MergeOptions:
    """How :func:`merge_checkpoints` merges.

    Args:
        weights: one number per checkpoint, equal ones for None. With ``base`` one number for each checkpoint but the first,
            ones for None.
        blocks: pattern of names, as in a shell -> the weight of the second checkpoint, or one weight for each but the first. The
            first checkpoint has the rest to one. The first pattern that fits a name counts; ``weights`` is for all others. Running means
            of a UNet's weights follow the weights.
            :func:`unet_blocks` makes patterns of the 25 customary numbers.
        base: add differences: ``first + sum_k weights[k] (checkpoint_k - base)``. It may lack integers and whole parts of the first, such as
            running means or a VAE: nothing is added to those.
    """

    weights: Sequence[float] | None = None
    blocks: Blocks | None = None
    base: str | Path | None = None


@dataclass(frozen=True)
class Tensors:
    """A checkpoint, and what makes its tensors of it by their names: as they are, or in a new order of units."""

    checkpoint: Checkpoint
    make: Callable[[str], torch.Tensor]


def merge_checkpoints(
    paths: Sequence[str | Path],
    out: str | Path,
    options: MergeOptions = MergeOptions(),
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> None:
    """Merge checkpoints that are aligned already, without holding any of them in memory.

    Example:
        >>> from fastmatch.checkpoint import MergeOptions, merge_checkpoints
        >>> merge_checkpoints(["model-a", "model-b"], "half")
        >>> by_layer = MergeOptions([0.7, 0.3], blocks={"*.layers.0.*": 0.1, "*.mlp.*": 0.6})
        >>> merge_checkpoints(["model-a", "model-b"], "merged", by_layer)

    Args:
        paths: files or folders of one architecture. The output has the names, types and files of the first.
        out: the file or folder to write.
        options: weights, weights by block, and the base of added differences.
        dtype: element type for floating point tensors; by default the first checkpoint's.
        force: replace an output that exists.
        progress: show a progress bar; None shows it on a terminal, for work of more than a second.

    Raises:
        ValueError: weights do not fit, the architectures differ, numbers of eight bits have scales beside them, the merge is not
            finite, or checkpoints differ in masks or parametrizations, whose average is not one of the weights (see
            :func:`fastmatch.merge`). What is at fault is named.
        OSError: a file is missing or cannot be written. Nothing is left half-written.

    Warns:
        UserWarning: the weights do not sum to one. Lines of the logger ``fastmatch`` name a prefix that one checkpoint has before
            all its names, which does not count, and tensors that a checkpoint lacks or has in
            another size; the first checkpoint counts in its place there. Of kernels with other input channels, as for
            inpainting, only the first four are merged, the latent.

    Integers are the first checkpoint's, and tensors that are equal in all checkpoints stay as they are if the weights sum to one. Sums run in
    float32 or wider.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError(f"paths: expected a list of at least two checkpoints, got {paths!r}")
    if len(paths) < 2:
        raise ValueError(f"paths: expected at least two checkpoints, got {len(paths)}")
    first, *others = checkpoints = [Checkpoint(path) for path in paths]
    for other in others:
        check_same_type(first, other)
    for other in others:
        take_tied_names(other, first)
        take_names(other, first)
    models = [Tensors(c, c.__getitem__) for c in checkpoints]
    write_merge(models, out, options, dtype=dtype, force=force, progress=progress)


def write_merge(
    models: Sequence[Tensors],
    out: str | Path,
    options: MergeOptions,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> None:
    """Write the merge of checkpoints in the order of units that each one's ``make`` gives; see :func:`merge_checkpoints`."""
    first, *others = models
    names = list(first.checkpoint)
    weight, weights = _weights(options, len(models))
    table = coefficients_by_name(names, weights, options.blocks)
    for model in models:
        check_unscaled(model.checkpoint)
    present = [_present(first.checkpoint, other.checkpoint) for other in others]
    base = None if options.base is None else Checkpoint(options.base)
    if base is not None:
        check_unscaled(base)
        take_tied_names(base, first.checkpoint)
        take_names(base, first.checkpoint)
        _check_base(first.checkpoint, base, frozenset().union(*present))
        present = [has & base.keys() for has in present]
        others = [_difference(other, base, has) for other, has in zip(others, present, strict=True)]
    fixed = fixed_parts(names)
    steps = iter(progress_bar(range(len(names)), "merging", show=progress))

    def merged(name: str) -> torch.Tensor:
        next(steps, None)
        tensor = first.make(name)
        if not _is_averaged(tensor):
            return tensor
        alphas = table.get(name, weights)
        shares = [
            (other, alpha) for other, alpha, has in zip(others, alphas, present, strict=True) if name in has
        ]
        mine = 1 - sum(alphas) if base is None and name in table else weight
        if base is None:
            mine += sum(alphas) - sum(alpha for _, alpha in shares)  # in place of those that lack it
        own = tensor.to(working_dtype(tensor.dtype))
        if name in fixed:
            expected = own if base is None else torch.zeros_like(own)
            for other, alpha in shares:
                if alpha:
                    check_equal_parts(name, expected, other.make(name), fixed, str(other.checkpoint.path))
            return tensor if dtype is None or tensor.is_complex() else tensor.to(dtype)
        total: torch.Tensor | None = None
        for other, alpha in shares:
            if alpha:
                part = other.make(name).to(own.dtype)
                if part.shape != own.shape:
                    part = with_more_inputs(part, own if base is None else torch.zeros_like(own))
                if base is None and torch.equal(part, own):  # stops at the first difference
                    mine += alpha
                else:
                    total = part * alpha if total is None else total.add_(part, alpha=alpha)
        if total is not None:
            total.add_(own, alpha=mine)
        else:
            # Equal tensors stay as they are: indices in a floating point type bear no rounding.
            total = own if is_one(mine) else own * mine
        result = total.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        check_finite({name: result}, "nothing is written: the merge")
        return result

    write_like(
        first.checkpoint, out, merged, dtype=dtype, force=force,
        metadata=metadata_of([model.checkpoint for model in models]),
    )  # fmt: skip
    next(steps, None)  # the bar ends


def _weights(options: MergeOptions, count: int) -> tuple[float, list[float]]:
    """Return the first checkpoint's weight, and those of the others."""
    if options.base is not None:
        others = [1.0] * (count - 1) if options.weights is None else options.weights
        return 1.0, check_weights(others, count - 1)
    first, *rest = check_weights(options.weights, count)
    warn_of_scale([first, *rest])
    return first, rest


def _is_averaged(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _check_base(first: Checkpoint, base: Checkpoint, names: Collection[str]) -> None:
    """Check that the base of a difference has what is needed of ``names``; a line counts the tensors that it lacks.

    It may lack what a picture does not need, or whole parts, as a pruned one: running means, a VAE, schedules.

    Raises:
        ValueError: it has a part, as the first word of the names tells, and lacks a tensor of it.
    """
    averaged = [name for name, tensor in first.headers.items() if name in names and _is_averaged(tensor)]
    absent = [name for name in averaged if name not in base]
    parts = {name.partition(".")[0] for name in base}
    for name in absent:
        if name.partition(".")[0] in parts and not name.endswith(UNUSED):
            raise ValueError(
                f"{base.path}: has no tensor {name!r}, which {first.path} has; architectures must be equal"
            )
    if len(absent) == len(averaged) > 0:
        raise ValueError(f"{base.path}: has none of the tensors of {first.path}; architectures must be equal")
    if absent:
        log.warning(
            "%s: lacks %d of the %d tensors of %s, such as %s; nothing is added to those", base.path, len(absent), len(first),
            first.path, ", ".join(absent[:3]),
        )  # fmt: skip


def _difference(other: Tensors, base: Checkpoint, names: Collection[str]) -> Tensors:
    """Return a checkpoint as its difference to the base, in ``names``, which both have."""
    checkpoint = other.checkpoint
    own = {
        name: tensor
        for name, tensor in checkpoint.headers.items()
        if name in names
        and _is_averaged(tensor)
        and not differ_in_inputs(name, base.headers[name].shape, tensor.shape)
    }
    check_same_architecture(
        own, {name: base.headers[name] for name in own}, str(checkpoint.path), str(base.path)
    )

    def make(name: str) -> torch.Tensor:
        tensor, old = other.make(name), base[name]
        work = torch.promote_types(working_dtype(tensor.dtype), working_dtype(old.dtype))
        if tensor.shape != old.shape:
            tensor, old = tensor[:, :LATENT], old[:, :LATENT]
        return tensor.to(work) - old.to(work)

    return Tensors(checkpoint, make)


def _check_hidden(first: Checkpoint, other: Checkpoint, names: Sequence[str]) -> None:
    """Raise ValueError where hidden units differ in number: a size by which one tensor's outputs differ, and another's inputs.

    Classes and words differ in number on one side alone, and the rest of the networks can be merged.
    """
    outputs: dict[tuple[int, int], str] = {}
    inputs: dict[tuple[int, int], str] = {}
    for name in names:
        shapes = first.headers[name].shape, other.headers[name].shape
        for dim, pair in enumerate(zip(*shapes, strict=False)):
            if pair[0] != pair[1] and len(shapes[0]) == len(shapes[1]) > 1:
                (inputs if dim else outputs).setdefault(pair, name)
    for pair in outputs.keys() & inputs.keys():
        raise ValueError(
            f"{other.path}: has {pair[1]} units between {outputs[pair]!r} and {inputs[pair]!r}, {first.path} has {pair[0]}; "
            "architectures must be equal"
        )


def _present(first: Checkpoint, other: Checkpoint) -> frozenset[str]:
    """Return the names of the tensors that both have in one size, or with other input channels; lines name those that differ.

    Raises:
        ValueError: there are none, or too many have another size.
    """
    shared = [name for name in first if name in other]
    same = frozenset(name for name in shared if first.headers[name].shape == other.headers[name].shape)
    sizes = [name for name in shared if name not in same]
    if not same or len(sizes) > FEW:
        check_same_architecture(first.headers, other.headers, str(first.path), str(other.path))
    wider = [n for n in sizes if differ_in_inputs(n, first.headers[n].shape, other.headers[n].shape)]
    sizes = [name for name in sizes if name not in wider]
    _check_hidden(first, other, sizes)
    log_differences(first, other)
    return same.union(wider)
