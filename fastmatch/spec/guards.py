"""What a pass with other answers may not do: fill the memory, go on without end, or break a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastmatch.spec.operations import bind, op_name, tensors_in
from fastmatch.spec.record import ValuesNeeded
from fastmatch.spec.uncomputed import form_of, on_meta

__all__ = ["Limits", "PathLeft"]

LARGER = 8
"""How many times as many entries as the largest tensor of the first pass a result may have, beside MOST."""

MOST = 1 << 20

LONGER = 4
"""How many times as many operations as the first pass another one may run, beside LEAST_OPERATIONS: a loop may be endless."""

LEAST_OPERATIONS = 1000

INDICES = {
    "embedding": ("indices", "weight", 0), "index_select": ("index", "self", "dim"), "gather": ("index", "self", "dim"),
    "scatter": ("index", "self", "dim"), "scatter_": ("index", "self", "dim"), "scatter_add": ("index", "self", "dim"),
    "scatter_add_": ("index", "self", "dim"), "take": ("index", "self", None),
}  # fmt: skip
"""Operation -> the argument that holds positions, the one in which they are positions, and along which dimension."""


class PathLeft(BaseException):
    """A pass with another answer goes where it must not be followed. No ``Exception``, so that models cannot catch it."""


class Limits:
    """What the first pass has needed, and whether an operation of another pass keeps to it."""

    def __init__(self) -> None:
        self.operations = self.largest = 0
        self._entries: dict[Any, int] = {}

    def note(self, operations: int, out: Any) -> None:
        """Take in the result of an operation of the first pass."""
        self.operations = operations
        self.largest = max([self.largest, *(t.numel() for t in tensors_in(out))])

    def check(self, operations: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise PathLeft if an operation of another pass may not run."""
        if operations > LEAST_OPERATIONS + LONGER * self.operations:
            raise PathLeft
        if not func.is_view and self._largest_of(func, args, kwargs) > MOST + LARGER * self.largest:
            raise PathLeft
        if any(t.is_cuda for t in tensors_in((args, kwargs))) and not _are_in_range(func, args, kwargs):
            raise PathLeft

    def _largest_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return how many entries the largest result has: found once for each form of the arguments."""
        key = func, form_of(args), form_of(kwargs)
        try:
            if key not in self._entries:
                self._entries[key] = _entries(func, args, kwargs)
            return self._entries[key]
        except TypeError:  # an argument that cannot be a key
            return _entries(func, args, kwargs)


def _entries(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many entries the largest result has; 0 if torch's rules of shapes do not say."""
    try:
        meta: dict[int, torch.Tensor] = {}
        given = {name: part for name, part in kwargs.items() if name != "device"}
        shaped = func(*on_meta(args, meta), **on_meta(given, meta), **_device(func))
    except (Exception, ValuesNeeded):  # values decide, or it fails: then it does so when it runs
        return 0
    return max((t.numel() for t in tensors_in(shaped)), default=0)


def _device(func: Any) -> dict[str, torch.device]:
    """Return the device of an operation that makes a tensor."""
    has_device = any(argument.name == "device" for argument in func._schema.arguments)
    return {"device": torch.device("meta")} if has_device else {}


def _are_in_range(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether positions are within their axis: a GPU does not recover from one that is not."""
    base = op_name(func).partition(".")[2]
    from_end = base in ("index", "index_put", "index_put_", "take")  # the others take no -1
    given = bind(func, args, kwargs)
    if base in INDICES:
        index, data, dim = INDICES[base]
        size = given[data].numel() if dim is None else given[data].shape[given[dim] if dim == "dim" else dim]
        pairs = [(given[index], size)]
    elif base in ("index", "index_put", "index_put_"):
        pairs = [
            (t, size)
            for t, size in zip(given["indices"], given["self"].shape, strict=False)
            if t is not None and t.dtype not in (torch.bool, torch.uint8)
        ]
    else:
        return True
    return all(
        not t.numel() or (-size * from_end <= int(t.min()) and int(t.max()) < size)
        for t, size in pairs
        if isinstance(t, torch.Tensor)
    )
