"""Refuse files in which numbers of eight bits count only with the scales beside them."""

from __future__ import annotations

from fastmatch.checkpoint.reader import Checkpoint

__all__ = ["check_unscaled"]

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale_input", "input_scale")
"""Last parts of the names of scales, beside ``weight``, in files of ComfyUI and of Hugging Face."""


def check_unscaled(checkpoint: Checkpoint) -> None:
    """Raise ValueError if a weight of eight bits has a scale: a sum of such numbers is not the sum of the weights.

    Only names and types are read.
    """
    for name, tensor in checkpoint.headers.items():
        if tensor.dtype.itemsize > 1 or not name.endswith("weight"):
            continue
        layer = name.removesuffix("weight")
        found = next((layer + scale for scale in SCALES if layer + scale in checkpoint), None)
        if found is not None:
            raise ValueError(
                f"{checkpoint.path}: tensor {name!r} is {str(tensor.dtype).removeprefix('torch.')} and counts only with its scale {found!r}; "
                "expected weights without scales: convert the file to float16 first"
            )
