"""The five residual networks of the package ``spliceai``, in torch, and sequences for them to read.

SpliceAI (Jaganathan et al. 2019) predicts splice sites from 10,000 bases of context; its authors trained five networks of one
architecture from different seeds and average their outputs. The weights are read from the installed package (GPLv3)
when this runs; nothing of it is stored here. To install it::

    pip install --no-deps spliceai h5py

No genome is needed. Sequences are drawn: exons and introns with the base and neighbour frequencies, lengths and splice
signals of human genes, rounded from textbooks. They are made up: scores on them say how alike networks answer, not how well they
find splice sites.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CONTEXT", "SpliceNetwork", "filled", "pretrained", "sequences"]

CHANNELS, CONTEXT, COUNT = 32, 5000, 5
STAGES = ((11, 1), (11, 4), (21, 10), (41, 25))
"""(kernel size, dilation) of each stage of four blocks."""
EPSILON = 1e-3
"""Of Keras' batch norm."""


def _conv(kernel: int, dilation: int = 1, inputs: int = CHANNELS, outputs: int = CHANNELS) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, kernel, padding="same", dilation=dilation)


def _norm() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(CHANNELS, eps=EPSILON)


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice, added to the input."""

    def __init__(self, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(), _conv(kernel, dilation)
        self.norm2, self.conv2 = _norm(), _conv(kernel, dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class SpliceNetwork(nn.Module):
    """Map (B, 4, L) one-hot bases to (B, 3, L - 2 context) logits: neither, acceptor, donor.

    Args:
        context: bases on each side that have no outputs. The weights were trained with 5000; a shorter one serves to trace.
    """

    def __init__(self, context: int = CONTEXT) -> None:
        super().__init__()
        self.context = context
        self.stem, self.skip = _conv(1, inputs=4), _conv(1)
        self.stages = nn.ModuleList(nn.Sequential(*(_Block(*shape) for _ in range(4))) for shape in STAGES)
        self.skips = nn.ModuleList(_conv(1) for _ in STAGES)
        self.head = _conv(1, outputs=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits without the context on both sides."""
        x = self.stem(x)
        total = self.skip(x)
        for stage, skip in zip(self.stages, self.skips, strict=True):
            x = stage(x)
            total = total + skip(x)
        return self.head(total[..., self.context : -self.context])


def pretrained() -> list[SpliceNetwork]:
    """Read the five networks of the installed package.

    Raises:
        ImportError: ``spliceai`` or ``h5py`` is not installed.
    """
    import h5py

    try:
        folder = Path(str(distribution("spliceai").locate_file("spliceai/models")))
    except PackageNotFoundError as error:
        raise ImportError("the networks are in a package: pip install --no-deps spliceai h5py") from error
    found = []
    for number in range(1, COUNT + 1):
        with h5py.File(folder / f"spliceai{number}.h5", "r") as file:
            found.append(filled(file["model_weights"]))
    return found


def filled(weights: Any) -> SpliceNetwork:
    """Return a network with Keras' weights, whose layers are numbered in the order in which they were made.

    Args:
        weights: the group ``model_weights`` of the file: ``weights[layer][layer][tensor]``.
    """
    net = SpliceNetwork()
    norms: list[nn.Module] = []
    convs: list[nn.Module] = [net.stem, net.skip]
    for stage, skip in zip(net.stages, net.skips, strict=True):
        for block in stage:
            norms += [block.norm1, block.norm2]
            convs += [block.conv1, block.conv2]
        convs.append(skip)
    convs.append(net.head)
    pairs = [(f"conv1d_{k}", conv, _of_conv) for k, conv in enumerate(convs, start=1)]
    pairs += [(f"batch_normalization_{k}", norm, _of_norm) for k, norm in enumerate(norms, start=1)]
    for name, module, read in pairs:
        group = weights[name][name]
        module.load_state_dict(
            {key: torch.from_numpy(np.asarray(value)) for key, value in read(group).items()}
        )
    return net.eval()


def _of_conv(group: Any) -> dict[str, np.ndarray]:
    return {"weight": group["kernel:0"][:].transpose(2, 1, 0).copy(), "bias": group["bias:0"][:]}


def _of_norm(group: Any) -> dict[str, np.ndarray]:
    return {
        "weight": group["gamma:0"][:], "bias": group["beta:0"][:], "running_mean": group["moving_mean:0"][:],
        "running_var": group["moving_variance:0"][:], "num_batches_tracked": np.array(0),
    }  # fmt: skip


# Sequences. Bases are numbered A, C, G, T.

DONOR = (
    "35 36 19 10",
    "60 13 13 14",
    "9 3 80 8",
    "0 0 100 0",
    "0 0 0 100",
    "53 3 42 2",
    "71 8 12 9",
    "7 6 81 6",
    "16 17 21 46",
)
"""Percent of A, C, G, T at the last three bases of an exon and the first six of an intron."""
TRACT, ACCEPTOR = "12 31 10 47", ("24 29 21 26", "5 65 1 29", "100 0 0 0", "0 0 100 0", "25 15 50 10")
"""Percent in the pyrimidine tract, and at the last four bases of an intron and the first of an exon."""
BRANCH = "5 40 5 50|5 5 5 85|40 10 40 10|98 1 1 0|10 60 5 25"
EXON_LENGTH, INTRON_LENGTH = (4.8, 0.4), (6.8, 0.9)
"""Mean and deviation of the logarithm."""
CPG = 0.25
"""How often CG occurs, to what the frequencies of C and G would give."""
TRACT_LENGTH = 16


def sequences(count: int, length: int, *, seed: int) -> torch.Tensor:
    """Draw (count, 4, length) one-hot sequences of exons and introns; each has its own share of G and C, 38% to 55%."""
    generator = np.random.default_rng(seed)
    eye = np.eye(4, dtype=np.float32)
    return torch.from_numpy(np.stack([eye[_gene(generator, length)].T for _ in range(count)]))


def _drawn(generator: np.random.Generator, percents: str) -> int:
    p = np.array(percents.split(), dtype=float)
    return int(generator.choice(4, p=p / p.sum()))


def _background(generator: np.random.Generator, count: int, gc: float) -> list[int]:
    """Draw bases one after the other; G after C is rare, as in human DNA."""
    base = np.array([1 - gc, gc, gc, 1 - gc]) / 2
    after = np.tile(base, (4, 1))
    after[1, 2] *= CPG
    cumulative = (after / after.sum(1, keepdims=True)).cumsum(1)
    found = [int(generator.choice(4, p=base))]
    for u in generator.random(count - 1):
        found.append(min(int(np.searchsorted(cumulative[found[-1]], u)), 3))
    return found


def _gene(generator: np.random.Generator, length: int) -> np.ndarray:
    """Return exons and introns in turn, from a random place on."""
    gc = generator.uniform(0.38, 0.55)
    bases: list[int] = []
    while len(bases) < length + 4000:
        exon, intron = (
            int(np.clip(generator.lognormal(*shape), 60, 8000)) for shape in (EXON_LENGTH, INTRON_LENGTH)
        )
        bases += _background(generator, exon, min(gc + 0.07, 0.6))
        bases[-3:] = []
        bases += [_drawn(generator, p) for p in DONOR]
        bases += _background(generator, intron, gc)
        bases += [_drawn(generator, p) for p in BRANCH.split("|")]
        bases += _background(generator, 12, gc)
        bases += [_drawn(generator, TRACT) for _ in range(TRACT_LENGTH)]
        bases += [_drawn(generator, p) for p in ACCEPTOR]
    start = int(generator.integers(0, 4000))
    return np.array(bases[start : start + length])
