"""mergekit's tensor loading: a state dict that reads each tensor on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["LoaderState"]


class LoaderState(Mapping[str, torch.Tensor]):
    """Present a loader such as mergekit's ``LazyTensorLoader`` as a read-only state dict.

    Example:
        >>> from fastmatch.backends.mergekit import LoaderState
        >>> class Loader:  # mergekit: LazyTensorLoader(ShardedTensorIndex.from_disk(path))
        ...     def __init__(self, state):
        ...         self.get_tensor, self.keys = state.__getitem__, state.keys
        >>> states = [LoaderState(Loader(model.state_dict())) for model in (model_a, model_b)]
        >>> spec = fm.PermutationSpec.trace(model_a, x)
        >>> matching = fm.WeightMatching().match(*states, spec)

    Args:
        loader: an object with ``get_tensor(name)`` and either ``index.tensor_paths`` or ``keys()``.

    Raises:
        TypeError: the loader lacks one of these.

    Memory: ``match_weights`` reads a tensor when it needs it. ``align`` and ``match`` read all tensors first.
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
