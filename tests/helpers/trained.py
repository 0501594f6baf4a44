"""Small networks trained on digits."""

from __future__ import annotations

from typing import NamedTuple

import torch

import fastmatch as fm
from fastmatch.studies.digits import Batches, digits, train
from fastmatch.studies.networks import mlp, vgg
from helpers.networks import ResNet

TRAINED = {
    "mlp": lambda: mlp(96),
    "vgg": lambda: vgg(8, norm="BN"),
    "vgg without norm": lambda: vgg(8),
    "resnet": lambda: ResNet(width=8, inputs=1),
}


class Planted(NamedTuple):
    model: torch.nn.Module
    x: torch.Tensor
    data: Batches
    spec: fm.PermutationSpec
    alignment: fm.Alignment


def trained(name: str, seed: int) -> tuple[torch.nn.Module, torch.Tensor]:
    data, _ = digits()
    torch.manual_seed(seed)
    return train(TRAINED[name](), data, epochs=2, seed=seed, lr=3e-3), data.inputs[:2]


def planted(name: str, seed: int) -> Planted:
    """Return a trained network, the data, and a random permutation to be found again."""
    model, x = trained(name, seed)
    data, _ = digits()
    spec = fm.PermutationSpec.trace(model, x)
    alignment = fm.Alignment(spec.random(torch.Generator().manual_seed(seed)), spec)
    data.reads = 0
    return Planted(model, x, data, spec, alignment)
