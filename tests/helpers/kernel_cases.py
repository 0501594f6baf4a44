"""Shared by the kernel tests: seeded generators, devices, strided copies."""

import torch

from helpers.networks import fresh_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cpu", "triton") if DEVICE == "cpu" else ("triton",)


def fresh_generator():
    """A generator with a fresh seed, which is printed."""
    return torch.Generator().manual_seed(fresh_seed())


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def strided(x):
    """The same values behind strides of two, in a buffer whose gaps are NaN."""
    buffer = torch.full([2 * n + 1 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view
