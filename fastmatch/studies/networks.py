"""Toy networks of the demo, the study, the tests and the benchmarks: MLPs, VGG-like nets and ResNets by width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.checks import check_choice, check_integer

__all__ = ["NETWORKS", "Block", "ChannelLayerNorm", "Network", "Norm", "StudyMethod", "mlp", "resnet", "vgg"]

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
        norm: builds a norm from its channels.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

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
    channels: int, *, blocks: Sequence[int] = (1, 1), shape: Shape = DIGIT, classes: int = 10
) -> nn.Module:
    """Build a ResNet with batch norm; stage ``s`` has ``blocks[s]`` blocks of ``channels * 2**s`` channels.

    ``blocks=(2, 2, 2, 2)`` with 64 channels is ResNet18 for small images.

    Example:
        >>> from fastmatch.studies.networks import resnet
        >>> resnet(4)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_integer("channels", channels, 1)
    stem = nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU()]
    inputs = channels
    for stage, count in enumerate(blocks):
        for k in range(count):
            outputs = channels * 2**stage
            layers.append(Block(inputs, outputs, 2 if stage > 0 and k == 0 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


@dataclass(frozen=True)
class Network:
    """One architecture of the study.

    Attributes:
        kind: the family.
        norm: the norm after each layer, if any.
        epochs: of training.
    """

    kind: Literal["MLP", "VGG", "ResNet"]
    norm: Norm | None
    epochs: int

    def __post_init__(self) -> None:
        if self.kind == "ResNet" and self.norm != "BN":
            raise ValueError(f"norm: expected 'BN' for a ResNet; got {self.norm!r}")

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
        if self.kind == "MLP":
            return mlp(BASE_UNITS * width, norm=self.norm, shape=shape, classes=classes)
        if self.kind == "VGG":
            return vgg(BASE_CHANNELS * width, norm=self.norm, shape=shape, classes=classes)
        return resnet(BASE_CHANNELS * width, shape=shape, classes=classes)


NETWORKS: dict[str, Network] = {
    "MLP": Network("MLP", None, 12),
    "MLP, BN": Network("MLP", "BN", 12),
    "MLP, LN": Network("MLP", "LN", 12),
    "VGG": Network("VGG", None, 10),
    "VGG, BN": Network("VGG", "BN", 10),
    "VGG, LN": Network("VGG", "LN", 10),
    "ResNet, BN": Network("ResNet", "BN", 10),
}
"""The architectures of the study, by name."""
