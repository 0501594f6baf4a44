"""Networks that pipelines and files add to a UNet or transformer, such as ControlNets: carried where the channels that they use keep their order.

They add to the hidden states between blocks, or read them there. The UNets of Stable Diffusion keep the order of those; the transformers of
SD3 and Flux do not.
"""

from __future__ import annotations

import logging
import re

from fastmatch.checkpoint.diffusion.components import CONTROLNET, find_components, has_role
from fastmatch.checkpoint.diffusion.folders import class_of
from fastmatch.checkpoint.diffusion.pipeline import networks_of
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.spec import PermutationSpec

__all__ = ["check_added"]

log = logging.getLogger("fastmatch")

ADDED = re.compile("ControlNet|MotionAdapter|T2IAdapter|MultiAdapter|IPAdapter")
"""What the names of their classes contain."""

BETWEEN_BLOCKS = re.compile(
    r"(?:unet|transformer)\.(?:conv_in|pos_embed\.proj|x_embedder|down_blocks\.\d+\.(?:resnets\.\d+\.conv2|downsamplers\.\d+\.conv)|"
    r"(?:down_blocks\.\d+|mid_block)\.attentions\.\d+\.proj_out|mid_block\.resnets\.\d+\.conv2)\.weight"
)
"""Parameters whose outputs are hidden states between blocks."""

INDEPENDENT = ("safety_checker", "image_encoder", "feature_extractor", "scheduler", "tokenizer")
"""Starts of the names of folders whose networks exchange nothing with the UNet or transformer but what keeps its order."""


def check_added(checkpoint: Checkpoint, spec: PermutationSpec) -> None:
    """Check the networks in a pipeline that are carried as they are; a line names those that nothing is known about.

    A ControlNet in one file with the UNet may move inside. What it adds keeps its order, and so must what it is added to.

    Raises:
        ValueError: one of them is added to hidden states whose order may change.
    """
    rows = [axis.parameter for group in spec.groups.values() for axis in group.axes if axis.dim == 0]
    if not checkpoint.parts:
        _check_in_file(checkpoint, rows)
        return
    moved = [name for name in rows if BETWEEN_BLOCKS.fullmatch(name)]
    aligned = {name for name, _ in networks_of(checkpoint.parts)}
    for folder in sorted(path for path in checkpoint.path.iterdir() if path.is_dir()):
        name = class_of(folder)
        if folder.name in aligned or folder.name.startswith(INDEPENDENT):
            continue
        if name is not None and ADDED.search(name):
            if moved:
                raise ValueError(
                    f"{folder}: holds a {name}, which is added to hidden states of {moved[0].partition('.')[0]!r}; their order changes, and "
                    "it cannot be permuted yet. Take it out, or keep that order with --no-residual (spec.without_residual())"
                )
        elif folder.name in checkpoint.parts:
            log.warning(
                "%s: carried as it is%s; it no longer fits if it reads hidden units of %s", folder,
                f" (a {name})" if name else "", ", ".join(sorted(aligned)),
            )  # fmt: skip


def _check_in_file(checkpoint: Checkpoint, moved: list[str]) -> None:
    """Raise ValueError if a file holds a ControlNet, and one of the parameters whose rows move makes hidden states of its UNet."""
    if checkpoint.path.is_dir() or not has_role(checkpoint, CONTROLNET):
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.headers.items()}
    between = {
        component.prefix + part.name
        for component in find_components(shapes, str(checkpoint.path))
        for name, source in component.layout.items()
        for part in source.parts
        if BETWEEN_BLOCKS.fullmatch(f"{component.kind.role}.{name}")
    }
    for name in moved:
        if name in between:
            raise ValueError(
                f"{checkpoint.path}: holds a ControlNet, which is added to hidden states of its UNet; the order of those of {name!r} changes. "
                "Keep that order with --no-residual (spec.without_residual()), or take the ControlNet out"
            )
