"""Parameters with several names, of which a file may hold one: safetensors' save_model writes no tensor twice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastmatch._internal.files import load_state
from fastmatch._internal.states import State

__all__ = ["load_state_for", "tied_names", "with_names_of"]


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of every parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def load_state_for(model: nn.Module, path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict, and add the names of tied parameters that the file lacks, with the tensor of another name.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_state`.
    """
    state = load_state(path)
    for names in tied_names(model):
        known = [name for name in names if name in state]
        state |= {name: state[known[0]] for name in names if known and name not in state}
    return state


def with_names_of(state: State, path: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict without the names of tied parameters that the file at ``path`` lacks."""
    lacking = {name for names in tied_names(model) for name in names}
    if lacking:
        lacking -= load_state(path, mmap=True).keys()
    return {name: tensor for name, tensor in state.items() if name not in lacking}
