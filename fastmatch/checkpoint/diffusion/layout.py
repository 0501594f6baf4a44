"""Learn which part of which tensor in a file becomes which parameter, by running a converter on placeholders.

A converter of diffusers renames tensors, splits fused ones along their first dimension, joins parts in another order,
transposes, and drops trailing dimensions of length one. A placeholder has the first dimension of its tensor and length
one elsewhere, and every entry is a number of its own. So the numbers in the converter's result show where each row of a
parameter comes from, and no weight is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["Conversion", "Converted", "Layout", "Part", "Shapes", "Source", "assemble"]

Shapes = Mapping[str, tuple[int, ...]]
"""Name -> shape."""

Conversion = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Turns the tensors of a file into the parameters of a module."""


@dataclass(frozen=True)
class Part:
    """The rows ``start`` to ``stop`` of a tensor in a file that has ``rows`` of them."""

    name: str
    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: parts of tensors, joined along their rows, then transposed or not."""

    parts: tuple[Part, ...]
    transposed: bool = False


Layout = dict[str, Source]
"""Name of a parameter of the module -> its source in the file."""


class Converted:
    """What a converter makes of placeholders.

    Args:
        shapes: name in the file -> shape, of the tensors that the converter gets.
        convert: the converter.

    Attributes:
        results: name of a parameter -> its placeholder.
    """

    def __init__(self, shapes: Shapes, convert: Conversion) -> None:
        self.shapes = shapes
        self._owners: list[tuple[str, int, int]] = []
        placeholders: dict[str, torch.Tensor] = {}
        begin = 0
        for name, shape in shapes.items():
            rows = shape[0] if shape else 1
            numbers = torch.arange(begin, begin + rows, device="cpu")
            placeholders[name] = numbers.reshape(rows, *(1,) * (len(shape) - 1)) if shape else numbers[0]
            self._owners += [(name, begin, rows)]
            begin += rows
        self._starts = torch.tensor([begin for _, begin, _ in self._owners], device="cpu")
        self.results = convert(placeholders)

    def layout(self, parameters: Shapes, argument: str) -> Layout:
        """Return the source of every parameter of a module.

        Args:
            parameters: name in the module -> shape.
            argument: the file in errors.

        Raises:
            ValueError: the converter yields no tensor for a parameter, or one of another shape.
        """
        return {name: self._source(name, tuple(shape), argument) for name, shape in parameters.items()}

    def _source(self, name: str, shape: tuple[int, ...], argument: str) -> Source:
        result = self.results.get(name)
        if result is None:
            raise ValueError(f"{argument}: has no tensor for the parameter {name!r} of its architecture")
        transposed = result.ndim == 2 and result.shape[0] == 1 and shape[0] != 1
        parts = self._parts(result.reshape(-1))
        rest = {_longer_than_one(self.shapes[part.name][1:]) for part in parts}
        expected = shape[::-1] if transposed else shape
        if result.numel() != (expected[0] if expected else 1) or rest != {_longer_than_one(expected[1:])}:
            raise ValueError(
                f"{argument}: tensor {parts[0].name!r} of shape {tuple(self.shapes[parts[0].name])} does not fit the "
                f"parameter {name!r} of shape {shape}"
            )
        return Source(parts, transposed)

    def _parts(self, numbers: torch.Tensor) -> tuple[Part, ...]:
        """Return runs of consecutive rows of one tensor as parts."""
        breaks = [0, *(torch.nonzero(numbers.diff() != 1).flatten() + 1).tolist(), len(numbers)]
        parts: list[Part] = []
        for first, last in pairwise(breaks):
            begin, end = int(numbers[first]), int(numbers[last - 1]) + 1
            while begin < end:  # consecutive numbers may go on in the next tensor
                owner = int(torch.searchsorted(self._starts, begin, right=True)) - 1
                name, start, rows = self._owners[owner]
                stop = min(end, start + rows)
                parts.append(Part(name, begin - start, stop - start, rows))
                begin = stop
        return tuple(parts)


def _longer_than_one(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n > 1)


def assemble(tensors: Mapping[str, torch.Tensor], source: Source, shape: tuple[int, ...]) -> torch.Tensor:
    """Return one parameter of a module from the tensors of its file: a view where there is one part.

    Args:
        tensors: name in the file -> tensor. Of a reduced model, they have fewer rows than the layout was learned with.
        source: where the parameter comes from.
        shape: its shape.
    """
    parts = []
    for part in source.parts:
        tensor = tensors[part.name]
        if part.stop - part.start == part.rows:
            parts.append(tensor)
            continue
        shrunk = part.rows // tensor.shape[0]
        parts.append(tensor.narrow(0, part.start // shrunk, (part.stop - part.start) // shrunk))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.T if source.transposed else whole.reshape(shape)
