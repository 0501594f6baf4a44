"""mergekit's tensor loading: a state dict that reads each tensor when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["LoaderState"]


class LoaderState(Mapping[str, torch.Tensor]):
    """A loader of the kind of mergekit's ``LazyTensorLoader``, as the state dict this package reads.

    Example:
        >>> a, b = (LoaderState(LazyTensorLoader(ShardedTensorIndex.from_disk(path))) for path in (first, second))
        >>> match_weights(a, b, spec)

    Args:
        loader: has ``get_tensor(name)`` and either ``index.tensor_paths`` or ``keys()``.

    ``match_weights`` asks for a tensor whenever it needs it and holds no model; ``align`` reads all first.
    """

    def __init__(self, loader: Any) -> None:
        if not callable(getattr(loader, "get_tensor", None)):
            raise TypeError(f"loader: expected an object with get_tensor(name), got {type(loader).__name__}")
        index = getattr(loader, "index", None)
        names = getattr(index, "tensor_paths", None)
        if names is None and callable(getattr(loader, "keys", None)):
            names = loader.keys()
        if names is None:
            raise TypeError("loader: expected index.tensor_paths or keys() that name its tensors")
        self.loader, self.names = loader, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.loader.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
