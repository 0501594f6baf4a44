"""Networks of the benchmarks, at the sizes of the literature. Those of ``fastmatch.studies`` are small, for digits."""

from __future__ import annotations

import torch
from torch import nn

import fastmatch as fm
from fastmatch.studies.networks import resnet

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


def resnet18(width: int = 64) -> nn.Module:
    """ResNet18 for 32 x 32 images."""
    return resnet(width, blocks=(2, 2, 2, 2), shape=(3, 32, 32))


def pair(build, example: tuple[int, ...], seed: int = 0):
    """Return two independently initialized networks in eval mode, the first one's spec, and example inputs."""
    torch.manual_seed(seed)
    models = build().eval(), build().eval()
    x = torch.randn(*example)
    return models, fm.PermutationSpec.trace(models[0], x), x
