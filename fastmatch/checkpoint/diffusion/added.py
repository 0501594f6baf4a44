"""Networks that pipelines add to a UNet or transformer, such as ControlNets: carried where the channels that they use keep their order.

They add to the hidden states between blocks, or read them there. The UNets of Stable Diffusion keep the order of those; the transformers of
SD3 and Flux do not.
"""

from __future__ import annotations

import logging
import re

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

    Raises:
        ValueError: one of them is added to hidden states whose order may change.
    """
    if not checkpoint.parts:
        return
    moved = [
        axis.parameter
        for group in spec.groups.values()
        for axis in group.axes
        if axis.dim == 0 and BETWEEN_BLOCKS.fullmatch(axis.parameter)
    ]
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
