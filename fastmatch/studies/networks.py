"""The study's networks, for images of any size: MLPs, VGG-like nets and a small ResNet, by norm and width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["NETWORKS", "Network"]

BASE_MLP, BASE_CONV = 64, 8
"""Hidden units and first channels at width 1; small enough that width 1 is too narrow to merge well."""


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes every position by itself."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def mlp(norm: str | None, width: int, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three hidden layers."""
    units = BASE_MLP * width
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = int(torch.Size(shape).numel())
    for _ in range(3):
        layers.append(nn.Linear(inputs, units, bias=norm != "BN"))
        if norm is not None:
            layers.append(nn.BatchNorm1d(units) if norm == "BN" else nn.LayerNorm(units))
        layers.append(nn.ReLU())
        inputs = units
    return nn.Sequential(*layers, nn.Linear(units, classes))


def _norm2d(norm: str | None, channels: int) -> list[nn.Module]:
    if norm is None:
        return []
    return [nn.BatchNorm2d(channels) if norm == "BN" else ChannelLayerNorm(channels)]


def vgg(norm: str | None, width: int, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Four convolutions with two poolings, and a hidden linear layer over 2 x 2 blocks."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for k, factor in enumerate((1, 1, 2, 2)):
        out = BASE_CONV * width * factor
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=norm != "BN"))
        layers += _norm2d(norm, out)
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if k % 2 else []
        channels = out
    hidden = 4 * BASE_CONV * width
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, after the last ReLU."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(_norm: str | None, width: int, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A stem and two stages of one block, batch norm throughout."""
    channels = BASE_CONV * width
    return nn.Sequential(
        nn.Conv2d(shape[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        Block(channels, channels, 1), Block(channels, 2 * channels, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One architecture of the study.

    Attributes:
        kind: ``"MLP"``, ``"VGG"`` or ``"ResNet"``.
        norm: ``"BN"``, ``"LN"`` or None.
        epochs: of training.
        build: ``build(norm, width, image shape, classes)``.
    """

    kind: str
    norm: str | None
    epochs: int
    build: Callable[[str | None, int, tuple[int, ...], int], nn.Module]

    @property
    def methods(self) -> tuple[str, ...]:
        """The renormalizations that apply."""
        return {
            None: ("repair", "rescale", "reshift", "bias"),
            "LN": ("repair", "rescale", "reshift"),
            "BN": ("reset", "repair", "rescale", "reshift"),
        }[self.norm]

    def make(self, width: int, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A new network of ``width`` times the base width."""
        return self.build(self.norm, width, shape, classes)


NETWORKS: dict[str, Network] = {
    **{f"MLP{', ' + norm if norm else ''}": Network("MLP", norm, 12, mlp) for norm in (None, "BN", "LN")},
    **{f"VGG{', ' + norm if norm else ''}": Network("VGG", norm, 10, vgg) for norm in (None, "BN", "LN")},
    "ResNet, BN": Network("ResNet", "BN", 10, resnet),
}
