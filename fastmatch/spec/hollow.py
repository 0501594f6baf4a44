"""Models on the meta device: traced with stand-ins for the weights that they do not have.

Entry (i, j) of a stand-in is entry i + j of one short random vector, a view with overlapping strides. Unlike fake tensors,
it has real values, which some rules of the tracer need (uniform constants, routers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["filled", "hollow_tensor"]


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


def hollow_tensor(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Return small random numbers of any shape in little memory: entry (i, j) is entry i + j of a vector."""
    vector = torch.randn(1 + sum(n - 1 for n in shape if n), generator=generator, device="cpu") * 0.02
    return vector.as_strided(tuple(shape), (1,) * len(shape))


def _stand_in(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of the same shape and type on the CPU; variances have to be positive, integers are zeros."""
    vector = hollow_tensor([1 + sum(n - 1 for n in tensor.shape if n)], generator)
    if not isinstance(tensor, nn.Parameter):
        vector = vector.abs()
    view = vector.to(tensor.dtype).as_strided(tensor.shape, (1,) * tensor.ndim)
    return nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
