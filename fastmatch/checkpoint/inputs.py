"""Kernels with other input channels, as UNets for inpainting have in their first layer: the channels of the latent, the first four, mean the
same in both. Those that follow are a mask, a depth or another picture."""

from __future__ import annotations

import torch

__all__ = ["LATENT", "differ_in_inputs", "with_more_inputs"]

LATENT = 4
"""Input channels that kernels of different numbers of them have in common."""

FIRST = ("conv_in.weight", "input_blocks.0.0.weight")
"""Ends of the names of first layers: in others, channels are hidden units, which another size does not keep in place."""


def differ_in_inputs(name: str, first: torch.Size, second: torch.Size) -> bool:
    """Whether the kernels of a UNet's first convolution differ in the number of input channels alone."""
    return (
        name.endswith(FIRST)
        and len(first) == len(second) == 4
        and first != second
        and (first[0], *first[2:]) == (second[0], *second[2:])
    )


def with_more_inputs(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a kernel with as many input channels as ``other``: the latent's from ``tensor``, the rest from ``other``."""
    return torch.cat([tensor[:, :LATENT], other[:, LATENT:].to(tensor.dtype)], dim=1)
