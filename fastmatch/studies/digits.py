"""The digits of scikit-learn as loaders, and a small trainer, for the demo and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.progress import progress_bar

__all__ = ["Batches", "digits", "train", "train_new"]


LEARNING_RATE = 2e-3
"""Of the networks of the demo and the study."""


class Batches:
    """Minibatches of two tensors in memory; the order is the same in every pass unless ``generator`` shuffles it.

    Example:
        >>> from fastmatch.studies.digits import Batches
        >>> batches = Batches(torch.randn(5, 3), torch.arange(5), size=2)
        >>> [len(inputs) for inputs, targets in batches]
        [2, 2, 1]

    Attributes:
        inputs: tensor, one sample per row.
        targets: tensor, one target per sample.
        size: samples per batch; the last batch may be smaller.
        generator: shuffles every pass; None keeps the order.
        reads: number of passes so far.
    """

    def __init__(
        self, inputs: torch.Tensor, targets: torch.Tensor, size: int, generator: torch.Generator | None = None
    ) -> None:
        self.inputs, self.targets, self.size, self.generator = inputs, targets, size, generator
        self.reads = 0

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (inputs, targets); the last batch may be smaller."""
        self.reads += 1
        count = len(self.inputs)
        order = None if self.generator is None else torch.randperm(count, generator=self.generator)
        for start in range(0, count, self.size):
            part = slice(start, start + self.size) if order is None else order[start : start + self.size]
            yield self.inputs[part], self.targets[part]


def digits(batch_size: int = 128) -> tuple[Batches, Batches]:
    """Return (train, test) over scikit-learn's 1797 handwritten digits as (B, 1, 8, 8) float32 in [-1, 1].

    Every fourth sample is a test sample. The data is part of scikit-learn; nothing is downloaded.

    Example:
        >>> from fastmatch.studies.digits import digits
        >>> train_data, test_data = digits()
        >>> train_data.inputs.shape
        torch.Size([1348, 1, 8, 8])

    Raises:
        ImportError: scikit-learn is not installed (``pip install fastmatch[demo]``).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'fastmatch[demo]'") from error
    flat, labels = load_digits(return_X_y=True)
    images = torch.tensor(flat, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels, dtype=torch.long)
    test = torch.arange(len(targets)) % 4 == 3
    return (
        Batches(images[~test], targets[~test], batch_size),
        Batches(images[test], targets[test], batch_size),
    )


def train(
    model: nn.Module,
    data: Batches,
    *,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    title: str = "training",
    progress: bool | None = None,
) -> nn.Module:
    """Train ``model`` in place with Adam and a cosine schedule on shuffled minibatches.

    Example:
        >>> from fastmatch.studies.digits import digits, train
        >>> from fastmatch.studies.networks import mlp
        >>> model = train(mlp(8), digits()[0], epochs=1, seed=0, progress=False)

    Args:
        model: a classifier.
        data: (inputs, targets).
        epochs: passes over the data.
        seed: of the order of the data.
        lr: the first learning rate.
        title: of the progress bar.
        progress: show the bar; None shows it on a terminal.

    Returns:
        ``model`` in eval mode.
    """
    shuffled = Batches(data.inputs, data.targets, data.size, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(shuffled))
    model.train()
    for _ in progress_bar(range(epochs), title, show=progress):
        for inputs, targets in shuffled:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def train_new(
    build: Callable[[], nn.Module],
    data: Batches,
    *,
    epochs: int,
    seed: int,
    title: str = "training",
    progress: bool | None = None,
) -> nn.Module:
    """Build a network and train it; ``seed`` determines its initialisation and the order of the data.

    Networks of the demo and the study are trained this way. See :func:`train` for the other arguments.
    """
    torch.manual_seed(seed)
    return train(build(), data, epochs=epochs, seed=seed, lr=LEARNING_RATE, title=title, progress=progress)
