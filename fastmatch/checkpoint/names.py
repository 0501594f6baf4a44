"""Present the tensors of a checkpoint under the names of the model's parameters, where the two differ.

For some models, transformers builds other modules than those that the names in their files refer to: layers are
renamed, and the experts of a mixture are stacked into one tensor. The conversions that transformers applies on loading
are read from its own tables. Here each tensor of a file becomes a :class:`Chunk` of a parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch.checkpoint.reader import Checkpoint

__all__ = ["Chunk", "Layout", "RenamedCheckpoint", "layout_of", "layout_without"]


@dataclass(frozen=True)
class Chunk:
    """The part of a parameter that one tensor of a file holds.

    Attributes:
        parameter: name of the parameter in the model.
        shape: shape of the whole parameter.
        index: index of the part in the parameter; empty if the tensor holds the whole parameter.
    """

    parameter: str
    shape: torch.Size
    index: tuple[int | slice, ...] = ()


Layout: TypeAlias = dict[str, Chunk]
"""Name of a tensor in the file -> the part of a parameter that it holds."""


def layout_of(model: nn.Module, headers: Mapping[str, torch.Tensor], argument: str) -> Layout:
    """Find the parameters of a transformers model that a checkpoint's tensors belong to.

    Args:
        model: a model of transformers; it may be on the meta device.
        headers: name in the checkpoint -> tensor. Only the shapes are read.
        argument: the name of the checkpoint in errors.

    Returns:
        A :data:`Layout`. A tensor that transformers does not convert keeps its name.

    Raises:
        ValueError: a conversion is not a renaming, stacking or concatenation, or a shape does not fit.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before 5.0 the modules had the same names as the files
        return layout_without("", headers)
    steps: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [s for s in steps if isinstance(s, WeightRenaming)]
    converters = [s for s in steps if isinstance(s, WeightConverter)]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefix: Any = getattr(model, "base_model_prefix", None)
    layout: Layout = {}
    parts: dict[str, dict[str, list[str]]] = {}
    for name in headers:
        target, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if pattern is None or target not in shapes:
            layout[name] = Chunk(target if target in shapes else name, headers[name].shape)
        else:
            parts.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, by_pattern in parts.items():
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        sources = [sorted(by_pattern[p], key=_natural) for p in converter.source_patterns if p in by_pattern]
        layout |= _chunks(target, shapes[target], sources, converter.operations, headers, argument)
    twice = [
        name for name, n in Counter(p.parameter for p in layout.values() if not p.index).items() if n > 1
    ]
    if twice:
        raise ValueError(f"{argument}: holds {twice[0]!r} under several names")
    return layout


def layout_without(prefix: str, headers: Mapping[str, torch.Tensor]) -> Layout:
    """Return the layout of a checkpoint whose names are those of the model after a prefix, which may be empty."""
    return {name: Chunk(name.removeprefix(prefix), tensor.shape) for name, tensor in headers.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in names by value: expert 10 after expert 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _chunks(
    target: str,
    shape: torch.Size,
    sources: list[list[str]],
    operations: Any,
    headers: Mapping[str, torch.Tensor],
    argument: str,
) -> Layout:
    """Return the chunks of one parameter: each list of tensors is stacked, then the stacks are concatenated."""
    dims = {type(op).__name__: getattr(op, "dim", None) for op in operations}
    stack, cat = dims.get("MergeModulelist"), dims.get("Concatenate")
    if set(dims) - {"MergeModulelist", "Concatenate"} or stack not in (None, 0):
        raise ValueError(
            f"{argument}: tensors such as {sources[0][0]!r} are made into {target!r} by {' and '.join(dims)} "
            "on loading, which is not supported; save the model under its own names or give a spec"
        )
    whole = torch.empty(shape, device="meta")
    found: Layout = {}
    start = filled = 0
    for names in sources:
        end = start
        for number, name in enumerate(names):
            index: list[int | slice] = [slice(None)] * len(shape)
            if stack is not None:
                index[stack] = number
            if cat is not None:
                end = start + headers[name].shape[cat - (stack is not None)]
                index[cat] = slice(start, end)
            fits = number < shape[0] and whole[tuple(index)].shape == headers[name].shape
            if not fits:
                raise ValueError(
                    f"{argument}: tensor {name!r} of shape {tuple(headers[name].shape)} does not fit "
                    f"into {target!r} of shape {tuple(shape)}"
                )
            filled += headers[name].numel()
            found[name] = Chunk(target, shape, tuple(index))
        start = end
    if filled != whole.numel():
        raise ValueError(
            f"{argument}: the {len(found)} tensors of {target!r}, such as {sources[0][0]!r}, hold {filled} of its "
            f"{whole.numel()} entries"
        )
    return found


class RenamedCheckpoint(Mapping[str, torch.Tensor]):
    """A checkpoint under the names of a model's parameters. Each parameter is assembled on demand.

    Args:
        checkpoint: the checkpoint as it is on disk.
        layout: name in the checkpoint -> the part of a parameter that the tensor holds.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint, self.path, self.device = checkpoint, checkpoint.path, checkpoint.device
        self._chunks: dict[str, dict[str, Chunk]] = {}
        for name, chunk in layout.items():
            self._chunks.setdefault(chunk.parameter, {})[name] = chunk

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Parameter name -> tensor on the meta device, which has a shape and type but no values."""
        return {name: self._assemble(self.checkpoint.headers, name) for name in self._chunks}

    def is_whole(self, name: str) -> bool:
        """Whether one tensor of the file holds the whole parameter."""
        return not any(chunk.index for chunk in self._chunks[name].values())

    def source_of(self, name: str) -> str:
        """Return the name in the file of the first tensor of a parameter."""
        return next(iter(self._chunks[name]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._assemble(self.checkpoint, name)

    def _assemble(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        chunks = self._chunks[name]
        whole: torch.Tensor | None = None
        for source, chunk in chunks.items():
            tensor = tensors[source]
            if not chunk.index:
                return tensor
            if whole is None:
                whole = torch.empty(chunk.shape, dtype=tensor.dtype, device=tensor.device)
            whole[chunk.index] = tensor
        assert whole is not None
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)
