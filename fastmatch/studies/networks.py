"""Toy networks of the demo, the study, the tests and the benchmarks: deep linear, MLPs, VGG-like nets, ResNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.checks import check_choice, check_integer

__all__ = [
    "NETWORKS",
    "Block",
    "ChannelLayerNorm",
    "Network",
    "Norm",
    "StudyMethod",
    "deep_linear",
    "mlp",
    "resnet",
    "vgg",
]

Norm: TypeAlias = Literal["BN", "LN"]
"""Which norm follows a layer: batch norm or layer norm; None means no norm."""

StudyMethod: TypeAlias = Literal["reset", "repair", "rescale", "reshift", "bias"]
"""A renormalization of the study; "bias" normalizes the biases of the merge without data."""

Shape: TypeAlias = tuple[int, ...]
"""Of an image: (channels, height, width)."""

DIGIT: Shape = (1, 8, 8)
BASE_UNITS, BASE_CHANNELS = 64, 8
"""Hidden units and first channels of the study at width 1, which is too narrow to merge well."""


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize every position separately."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution.
        norm: builds a norm from its channels; None builds none, and convolutions with biases.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        build, bias = norm or (lambda _: nn.Identity()), norm is None
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)
        self.norm1 = build(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=bias)
        self.norm2 = build(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=bias), build(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output, after the last ReLU."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return F.relu(y)


def _check_norm(norm: Norm | None) -> None:
    if norm is not None:
        check_choice("norm", norm, Norm)


def mlp(width: int, *, norm: Norm | None = None, shape: Shape = DIGIT, classes: int = 10) -> nn.Module:
    """Build an MLP with three hidden layers of ``width`` units on images.

    Example:
        >>> from fastmatch.studies.networks import mlp
        >>> mlp(16)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_integer("width", width, 1)
    _check_norm(norm)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = torch.Size(shape).numel()
    for _ in range(3):
        layers.append(nn.Linear(inputs, width, bias=norm != "BN"))
        if norm is not None:
            layers.append(nn.BatchNorm1d(width) if norm == "BN" else nn.LayerNorm(width))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers, nn.Linear(width, classes))


def deep_linear(width: int, *, hidden: int = 5, shape: Shape = DIGIT, classes: int = 10) -> nn.Module:
    """Build a network of linear layers alone: ``hidden`` of ``width`` units, and the classifier.

    Example:
        >>> from fastmatch.studies.networks import deep_linear
        >>> deep_linear(16)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_integer("width", width, 1)
    check_integer("hidden", hidden, 1)
    sizes = [torch.Size(shape).numel(), *[width] * hidden, classes]
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in pairwise(sizes)))


def vgg(channels: int, *, norm: Norm | None = None, shape: Shape = DIGIT, classes: int = 10) -> nn.Module:
    """Build a small VGG: four 3 x 3 convolutions, two poolings, a hidden layer over 2 x 2 blocks, a classifier.

    ``channels`` are those of the first two convolutions; the next two have twice as many.

    Example:
        >>> from fastmatch.studies.networks import vgg
        >>> vgg(4, norm="BN")(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_integer("channels", channels, 1)
    _check_norm(norm)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for k, outputs in enumerate((channels, channels, 2 * channels, 2 * channels)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm != "BN"))
        if norm is not None:
            layers.append(nn.BatchNorm2d(outputs) if norm == "BN" else ChannelLayerNorm(outputs))
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if k % 2 else []
        inputs = outputs
    hidden = 4 * channels
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def resnet(
    channels: int,
    *,
    blocks: Sequence[int] = (1, 1),
    norm: Literal["BN"] | None = "BN",
    shortcuts: bool = True,
    shape: Shape = DIGIT,
    classes: int = 10,
) -> nn.Module:
    """Build a ResNet; stage ``s`` has ``blocks[s]`` blocks of ``channels * 2**s`` channels.

    ``blocks=(2, 2, 2, 2)`` with 64 channels is ResNet18 for small images. Without ``shortcuts`` it has the same
    convolutions in a chain, except for those on shortcuts.

    Example:
        >>> from fastmatch.studies.networks import resnet
        >>> resnet(4)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_integer("channels", channels, 1)
    _check_norm(norm)
    build = nn.BatchNorm2d if norm else None

    def normed(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=build is None)
        return [conv, *([build(outputs)] if build else []), nn.ReLU()]

    layers = normed(shape[0], channels, 1)
    inputs = channels
    for stage, count in enumerate(blocks):
        for k in range(count):
            outputs, stride = channels * 2**stage, 2 if stage > 0 and k == 0 else 1
            if shortcuts:
                layers.append(Block(inputs, outputs, stride, build))
            else:
                layers += normed(inputs, outputs, stride) + normed(outputs, outputs, 1)
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@dataclass(frozen=True)
class Network:
    """One architecture of the study.

    Attributes:
        kind: the family; "Chain" is the ResNet without shortcuts.
        norm: the norm after each layer, if any.
        epochs: of training.
    """

    kind: Literal["Linear", "MLP", "VGG", "ResNet", "Chain"]
    norm: Norm | None
    epochs: int

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Norm | None, ...]] = {
            "Linear": (None,), "ResNet": (None, "BN"), "Chain": (None, "BN"),
        }  # fmt: skip
        if self.norm not in allowed.get(self.kind, (None, "BN", "LN")):
            raise ValueError(
                f"norm: expected one of {allowed[self.kind]} for kind {self.kind!r}; got {self.norm!r}"
            )

    @property
    def methods(self) -> tuple[StudyMethod, ...]:
        """The renormalizations that apply."""
        methods: dict[Norm | None, tuple[StudyMethod, ...]] = {
            None: ("repair", "rescale", "reshift", "bias"),
            "LN": ("repair", "rescale", "reshift"),
            "BN": ("reset", "repair", "rescale", "reshift"),
        }
        return methods[self.norm]

    def make(self, width: int, shape: Shape, classes: int) -> nn.Module:
        """Build a new network of ``width`` times the base width."""
        units, channels = BASE_UNITS * width, BASE_CHANNELS * width
        if self.kind == "Linear":
            return deep_linear(units, shape=shape, classes=classes)
        if self.kind == "MLP":
            return mlp(units, norm=self.norm, shape=shape, classes=classes)
        if self.kind == "VGG":
            return vgg(channels, norm=self.norm, shape=shape, classes=classes)
        norm, shortcuts = "BN" if self.norm else None, self.kind == "ResNet"
        return resnet(channels, norm=norm, shortcuts=shortcuts, shape=shape, classes=classes)


NETWORKS: dict[str, Network] = {
    "Deep linear": Network("Linear", None, 12),
    "MLP": Network("MLP", None, 12),
    "MLP, BN": Network("MLP", "BN", 12),
    "MLP, LN": Network("MLP", "LN", 12),
    "VGG": Network("VGG", None, 10),
    "VGG, BN": Network("VGG", "BN", 10),
    "VGG, LN": Network("VGG", "LN", 10),
    "ResNet": Network("ResNet", None, 10),
    "ResNet, no shortcuts": Network("Chain", None, 10),
    "ResNet, BN": Network("ResNet", "BN", 10),
}
"""The architectures of the study, by name."""
