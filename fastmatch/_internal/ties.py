"""Parameters with several names."""

from __future__ import annotations

from torch import nn

__all__ = ["tied_names"]


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]
