"""Networks of the benchmarks, at the sizes of the literature. Those of ``fastmatch.studies`` are small, for digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def mlp(width: int, depth: int = 3, inputs: int = 784) -> nn.Module:
    """``depth`` hidden layers; the paper's MNIST network has three of 512."""
    layers: list[nn.Module] = []
    for k in range(depth):
        layers += [nn.Linear(inputs if k == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def vgg16(width: float = 1.0) -> nn.Module:
    """VGG16 on 32 x 32 images, without norm, channels times ``width``."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG16:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
        else:
            out = int(item * width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10))


class Block(nn.Module):
    """A basic block of ResNet18; written with modules, as rebasin's tracer needs."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.down = None
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet18 for 32 x 32 images."""
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        out = width * 2**stage
        blocks += [Block(channels, out, 1 if stage == 0 else 2), Block(out, out, 1)]
        channels = out
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


def pair(build, example: tuple[int, ...], seed: int = 0):
    """Return two independently initialized networks in eval mode, the first one's spec, and example inputs."""
    torch.manual_seed(seed)
    models = build().eval(), build().eval()
    x = torch.randn(*example)
    return models, fm.PermutationSpec.trace(models[0], x), x
