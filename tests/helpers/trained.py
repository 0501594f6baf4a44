"""Small networks trained on digits, once a process."""

from __future__ import annotations

import torch

from fastmatch.studies.demo import conv_net, mlp
from fastmatch.studies.digits import digits, train
from helpers.networks import ResNet

TRAINED = {
    "mlp": lambda: mlp(96),
    "vgg": lambda: conv_net(8, norm=True),
    "vgg without norm": lambda: conv_net(8, norm=False),
    "resnet": lambda: ResNet(width=8, inputs=1),
}


def trained(name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    data, _ = digits()
    torch.manual_seed(seed)
    return train(TRAINED[name](), data, epochs=2, seed=seed, lr=3e-3), data.inputs[:2]
