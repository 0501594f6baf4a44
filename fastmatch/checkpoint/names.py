"""A checkpoint's tensors under the names of the model's parameters, where the two differ.

Transformers builds some models with other modules than those whose names their files carry: layers are renamed,
and the experts of a mixture are stacked into one tensor. Its own tables of conversions, which it follows on
loading, say which; here they become a :class:`Piece` for every tensor of a file.
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

__all__ = ["Layout", "Piece", "UnderParameterNames", "layout_of"]


@dataclass(frozen=True)
class Piece:
    """Which entries of which parameter a tensor of a file holds; ``index`` is empty where it holds them all."""

    parameter: str
    shape: torch.Size
    index: tuple[int | slice, ...] = ()


Layout: TypeAlias = dict[str, Piece]
"""Name in the file -> where the tensor lies in the model."""


def layout_of(model: nn.Module, headers: Mapping[str, torch.Tensor], argument: str) -> Layout:
    """Where the tensors of a checkpoint lie in a model of transformers; one that it does not know keeps its name.

    Args:
        model: may be on the meta device.
        headers: name in the checkpoint -> tensor, of which only the shape is read.
        argument: what to call the checkpoint in errors.

    Raises:
        ValueError: a conversion is none of renaming, stacking and concatenating, or a shape does not fit.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before 5.0 modules had the names that their files have
        return {name: Piece(name, tensor.shape) for name, tensor in headers.items()}
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
            layout[name] = Piece(target if target in shapes else name, headers[name].shape)
        else:
            parts.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, by_pattern in parts.items():
        converter = next(c for c in converters if set(by_pattern) <= set(c.source_patterns))
        sources = [sorted(by_pattern[p], key=_natural) for p in converter.source_patterns if p in by_pattern]
        layout |= _pieces(target, shapes[target], sources, converter.operations, headers, argument)
    twice = [
        name for name, n in Counter(p.parameter for p in layout.values() if not p.index).items() if n > 1
    ]
    if twice:
        raise ValueError(f"{argument}: holds {twice[0]!r} under several names")
    return layout


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts the tenth expert after the second."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _pieces(
    target: str,
    shape: torch.Size,
    sources: list[list[str]],
    operations: Any,
    headers: Mapping[str, torch.Tensor],
    argument: str,
) -> Layout:
    """The pieces of one parameter: every list of tensors is stacked, then the stacks are concatenated."""
    dims = {type(op).__name__: getattr(op, "dim", None) for op in operations}
    stack, cat = dims.get("MergeModulelist"), dims.get("Concatenate")
    if set(dims) - {"MergeModulelist", "Concatenate"} or stack not in (None, 0):
        raise ValueError(
            f"{argument}: tensors such as {sources[0][0]!r} are made into {target!r} by {' and '.join(dims)} "
            "on loading, which is not followed; save the model under its own names or give a spec"
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
            found[name] = Piece(target, shape, tuple(index))
        start = end
    if filled != whole.numel():
        raise ValueError(
            f"{argument}: the {len(found)} tensors of {target!r}, such as {sources[0][0]!r}, hold {filled} of its "
            f"{whole.numel()} entries"
        )
    return found


class UnderParameterNames(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint as a model's parameters, each put together when asked for."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self._pieces: dict[str, dict[str, Piece]] = {}
        for name, piece in layout.items():
            self._pieces.setdefault(piece.parameter, {})[name] = piece

    @cached_property
    def headers(self) -> dict[str, torch.Tensor]:
        """Name of a parameter -> tensor without values (on the meta device)."""
        return {name: self._assemble(self.checkpoint.headers, name) for name in self._pieces}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._assemble(self.checkpoint, name)

    def _assemble(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        pieces = self._pieces[name]
        whole: torch.Tensor | None = None
        for source, piece in pieces.items():
            tensor = tensors[source]
            if not piece.index:
                return tensor
            if whole is None:
                whole = torch.empty(piece.shape, dtype=tensor.dtype, device=tensor.device)
            whole[piece.index] = tensor
        assert whole is not None
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)
