"""Files of a model that is known, where their names differ from the model's.

A file may hold one name of a parameter that has several: safetensors' save_model writes no tensor twice. And it may hold the model
inside of another module, such as Lightning's or that of torch.compile: then a prefix is before every name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastmatch._internal.files import load_state
from fastmatch._internal.states import State, prefix_of, under_prefix
from fastmatch._internal.ties import tied_names

__all__ = ["load_state_for", "named_as", "named_for", "with_names_of"]


def load_state_for(model: nn.Module, path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict under the names of the model.

    Raises:
        FileNotFoundError: see :func:`load_state`.
        ValueError: see :func:`load_state`; or the names of the model have a prefix in the file, and others have none.
    """
    return named_for(model, load_state(path), str(path))


def named_for(model: nn.Module, state: dict[str, torch.Tensor], argument: str) -> dict[str, torch.Tensor]:
    """Return a state dict under the names of the model: without a prefix, and with all names of tied parameters.

    Raises:
        ValueError: the names of the model have a prefix in the state dict, and others have none.
    """
    prefix = _prefix(model, state)
    if not all(name.startswith(prefix) for name in state):
        raise ValueError(f"{argument}: {under_prefix(prefix, state, argument)}")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for names in tied_names(model):
        known = [name for name in names if name in state]
        state |= {name: state[known[0]] for name in names if known and name not in state}
    return state


def with_names_of(state: State, path: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict of the model under the names of the file at ``path``: what :func:`load_state_for` undid."""
    return named_as(state, load_state(path, mmap=True), model)


def named_as(state: State, held: State, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict of the model under the names that ``held`` has: what :func:`named_for` undid."""
    prefix = _prefix(model, held)
    lacking = {name for names in tied_names(model) for name in names if prefix + name not in held}
    return {prefix + name: tensor for name, tensor in state.items() if name not in lacking}


def _prefix(model: nn.Module, held: State) -> str:
    """Return the prefix that the model's names have; of a tied parameter one name is enough."""
    spare = {name for names in tied_names(model) for name in names}
    names = [name for name in model.state_dict() if name not in spare]
    return prefix_of(names, held) if names and not set(names) & held.keys() else ""
