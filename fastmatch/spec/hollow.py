"""Models on the meta device: traced with stand-ins for the weights that they do not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["filled"]


@contextmanager
def filled(model: nn.Module) -> Iterator[None]:
    """Inside, replace parameters and buffers on the meta device by overlapping views of short random vectors.

    A parameter of any size takes the memory of one vector. Tied ones stay tied. Afterwards the model is as it was.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[int, torch.Tensor] = {}
    before: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    before.append((table, name, tensor))  # type: ignore[arg-type]
                    if id(tensor) not in made:
                        made[id(tensor)] = _stand_in(tensor, generator)
    for table, name, tensor in before:
        table[name] = made[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


def _stand_in(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of the same shape and type on the CPU; variances have to be positive, integers are zeros."""
    length = 1 + sum(n - 1 for n in tensor.shape if n)
    vector = 0.02 * torch.randn(length, generator=generator, device="cpu")
    vector = (
        vector.abs().to(tensor.dtype) if not isinstance(tensor, nn.Parameter) else vector.to(tensor.dtype)
    )
    view = vector.as_strided(tensor.shape, (1,) * tensor.ndim)
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
