"""Apply permutations to a checkpoint on disk, or to a LoRA of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from fastmatch._internal.json_files import read_json
from fastmatch._internal.states import State
from fastmatch.checkpoint.align import AlignedTensors
from fastmatch.checkpoint.diffusion.components import CONTROLNET, find_components, has_role
from fastmatch.checkpoint.diffusion.lora import is_lora, permute_lora
from fastmatch.checkpoint.diffusion.single_file import EMA, check_rest, with_running_mean
from fastmatch.checkpoint.inputs import differ_in_inputs
from fastmatch.checkpoint.modules import leave_what_does_not_fit
from fastmatch.checkpoint.names import RenamedCheckpoint
from fastmatch.checkpoint.pairs import layout_for
from fastmatch.checkpoint.reader import ADAPTER, Checkpoint
from fastmatch.checkpoint.same_model import check_is_model
from fastmatch.checkpoint.scaled import check_unscaled
from fastmatch.checkpoint.structure import bind
from fastmatch.checkpoint.tracing import is_diffusion
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.alignment import Alignment
from fastmatch.spec import PermutationSpec
from fastmatch.spec.common import other_sizes, resized, restricted

log = logging.getLogger("fastmatch")

__all__ = ["apply_to_checkpoint"]


def apply_to_checkpoint(
    alignment: Alignment, path: str | Path, out: str | Path, *, force: bool = False
) -> str:
    """Permute checkpoint B, or a LoRA that was trained on B, and write the result.

    A LoRA is permuted so that it adds to B aligned what it adds to B.

    Example:
        >>> from fastmatch.checkpoint import align_checkpoints, apply_to_checkpoint
        >>> alignment = align_checkpoints("model-a", "model-b", "aligned")
        >>> apply_to_checkpoint(alignment, "model-b", "aligned-again")
        'checkpoint'

    Args:
        alignment: the permutations of B, in the names of its file.
        path: a file or directory with the tensors of B, or a file with the factors of a LoRA: names of kohya, LyCORIS,
            diffusers or peft; LoRA, LoCon, LoHa, LoKr, DoRA and full differences. Or the directory of an adapter of peft: LoRA and
            DoRA of layers and embeddings, with the layers and biases that it holds whole. A file of a diffusion model may have more
            than the one that was aligned, and running means of the UNet's weights move with them; or it may lack whole networks.
            A ControlNet beside the UNet is carried as it is if the permutations do not name it.
            Axes that keep their order may have another size, as the inputs of a UNet for inpainting or the classes of a head.
        out: the file or directory to write, with the same names, shapes and types.
        force: replace an output that exists.

    Returns:
        What was permuted: ``"checkpoint"`` or ``"LoRA"``.

    Raises:
        ValueError: a tensor does not fit the permutations or belongs to a network that is added to the UNet, numbers of eight bits
            have scales beside them, the result holds NaN or infinity, or a factor of the LoRA cannot follow them exactly, as a
            Kronecker factor whose rows do not move in blocks. The tensor is named.
        OSError: a file is missing or cannot be written. Nothing is left half-written.
    """
    checkpoint = Checkpoint(path)
    if is_lora(checkpoint.headers):
        config = read_json(checkpoint.path / ADAPTER) if (checkpoint.path / ADAPTER).is_file() else {}
        transposed = config.get("fan_in_fan_out") or False
        if not isinstance(transposed, bool):
            raise ValueError(
                f"{checkpoint.path / ADAPTER}: fan_in_fan_out: expected true or false; got {transposed!r}"
            )
        moved = permute_lora(dict(checkpoint), alignment, str(path), is_transposed=transposed)
        write_like(checkpoint, out, moved.__getitem__, force=force)
        return "LoRA"
    check_is_model(checkpoint)
    check_unscaled(checkpoint)
    is_file = not checkpoint.path.is_dir() and is_diffusion(path, checkpoint)
    if is_file:
        if has_role(checkpoint, CONTROLNET) and alignment.spec.shapes.keys().isdisjoint(checkpoint):
            raise ValueError(
                f"{path}: holds a ControlNet, of which the permutations have no name; one that they do not move fits the aligned UNet as it is"
            )
        alignment = _of_networks_in(alignment, checkpoint)
    leave_what_does_not_fit(checkpoint, alignment.spec)
    layout = layout_for(path, checkpoint, alignment.spec)
    headers = RenamedCheckpoint(checkpoint, layout).headers
    alignment = replace(alignment, spec=_in_sizes_of(headers, alignment.spec, str(path)))
    bind(alignment.spec, headers, str(path))
    if is_file:
        # The permutations may come from a file that had less.
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.headers.items()}
        added = (c for c in find_components(shapes, str(path)) if c.kind.role == CONTROLNET)
        owned = {component.prefix + name for component in added for name in component.shapes}
        check_rest(shapes, owned | alignment.spec.shapes.keys(), str(path))
        alignment = replace(alignment, spec=with_running_mean(alignment.spec, shapes, str(path)))
    write_like(checkpoint, out, AlignedTensors(checkpoint, layout, alignment), force=force)
    return "checkpoint"


def _in_sizes_of(headers: State, spec: PermutationSpec, argument: str) -> PermutationSpec:
    """Return a spec with the sizes that a checkpoint has along axes that keep their order, as the inputs of a UNet for inpainting.

    A line names the tensors, but not a first convolution: it has other inputs in every such UNet.
    """
    expected = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    names = other_sizes(spec, expected, headers)
    told = [n for n in names if not differ_in_inputs(n, expected[n].shape, headers[n].shape)]
    if told:
        log.warning(
            "%s: of another size than in the checkpoint of the permutations, along axes that keep their order: %s", argument,
            ", ".join(f"{n} {tuple(headers[n].shape)}, not {spec.shapes[n]}" for n in sorted(told)[:3]) + (", ..." if told[3:] else ""),
        )  # fmt: skip
    return resized(spec, names, headers)


def _of_networks_in(alignment: Alignment, checkpoint: Checkpoint) -> Alignment:
    """Return the permutations of the networks that a file has, as a pruned one; a line names those that it lacks."""
    spec = alignment.spec
    networks = [c.prefix for c in find_components(spec.shapes, str(checkpoint.path)) if c.prefix]
    absent = [
        prefix
        for prefix in (*networks, EMA)
        if any(name.startswith(prefix) for name in spec.shapes)
        and not any(name.startswith(prefix) for name in checkpoint)
    ]
    kept = [name for name in spec.shapes if not name.startswith(tuple(absent))]
    if not kept or len(kept) == len(spec.shapes):
        return alignment
    log.warning(
        "%s: has no %s, which the permutations move as well",
        checkpoint.path,
        ", ".join(p.rstrip(".") for p in absent),
    )
    spec = restricted(spec, kept)
    return replace(
        alignment, spec=spec, permutations={name: alignment.permutations[name] for name in spec.groups}
    )
