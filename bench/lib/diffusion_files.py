"""Files of diffusion models with the names and sizes of real ones, and random numbers in them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from fastmatch._internal.safetensors_file import write_safetensors
from fastmatch.checkpoint import Checkpoint
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import PermutationSpec

__all__ = ["noisy", "plant", "write_random", "write_sibling"]

Shapes = Mapping[str, tuple[int, ...]]


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _random(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return weights of a size that keeps activations of order one."""
    noise = torch.randn(shape, generator=_generator(name, seed))
    if len(shape) > 1:
        return noise.mul_(noise[0].numel() ** -0.5)
    return noise.mul_(0.3).add_(1 if name.endswith(("weight", "scale")) else 0)


def write_random(path: Path, shapes: Shapes, seed: int, dtype: torch.dtype = torch.float16) -> None:
    """Write a file of random numbers, tensor by tensor."""
    headers = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    write_safetensors(
        path, path, headers, lambda name: _random(name, tuple(shapes[name]), seed).to(dtype), {}
    )


def noisy(source: Checkpoint, name: str, noise: float, seed: int = 7) -> torch.Tensor:
    """Return a tensor of a checkpoint plus noise of ``noise`` times its standard deviation, in its own type."""
    tensor = source[name]
    added = torch.randn(tensor.shape, generator=_generator(name, seed))
    size = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
    return added.mul_(noise * size).add_(tensor).to(tensor.dtype)


def write_sibling(path: Path, out: Path, noise: float, seed: int = 1) -> None:
    """Write a copy with noise, whose units keep their order."""
    source = Checkpoint(path)
    write_like(source, out, lambda name: noisy(source, name, noise, seed))


def plant(path: Path, out: Path, spec: PermutationSpec, noise: float, seed: int = 1) -> None:
    """Write a copy with noise, permuted at random by a spec."""
    source = Checkpoint(path)
    permutations = spec.random(torch.Generator().manual_seed(seed))
    write_like(source, out, lambda name: permute_tensor(noisy(source, name, noise), name, spec, permutations))
