"""Small networks trained on digits."""

from __future__ import annotations

import torch

from fastmatch.studies.digits import digits, train
from fastmatch.studies.networks import mlp, vgg
from helpers.networks import ResNet

TRAINED = {
    "mlp": lambda: mlp(96),
    "vgg": lambda: vgg(8, norm="BN"),
    "vgg without norm": lambda: vgg(8),
    "resnet": lambda: ResNet(width=8, inputs=1),
}


def trained(name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    data, _ = digits()
    torch.manual_seed(seed)
    return train(TRAINED[name](), data, epochs=2, seed=seed, lr=3e-3), data.inputs[:2]
