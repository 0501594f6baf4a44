"""Parts of a model that an example does not reach: experts that get no tokens, and what is read in training only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastmatch.spec.labels import pin, unify
from fastmatch.spec.operations import tensors_in
from fastmatch.spec.record import Record

__all__ = ["Siblings", "training"]

SIBLING = "computed by a module beside one that was not called"


class Siblings:
    """Calls the modules of a list that the forward pass did not call as it called one of their kind.

    A hand-written mixture of experts calls those experts that get tokens. The others read and write the same units:
    each is called with the inputs of one that was called, and its outputs are united with that one's outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: dict[int, tuple[Any, Any, Any]] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note how the members of every list of modules are called first."""
        members = {
            id(child): child
            for module in self._model.modules()
            if isinstance(module, (nn.ModuleList, nn.ModuleDict))
            for child in module.children()
        }

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._calls.setdefault(id(module), (args, kwargs, output))

        handles = [child.register_forward_hook(note, with_kwargs=True) for child in members.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def call_others(self, record: Record) -> None:
        """Call every member that was not called; run this inside the tracer."""
        for parent in list(self._model.modules()):
            if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
                continue
            called = {_kind(c): self._calls[id(c)] for c in parent.children() if id(c) in self._calls}
            for child in parent.children():
                if id(child) not in self._calls and _kind(child) in called:
                    args, kwargs, output = called[_kind(child)]
                    try:
                        self._unite(record, child(*args, **kwargs), output)
                    except RuntimeError:
                        continue  # it takes other inputs than its sibling; its parameters stay unread

    def _unite(self, record: Record, output: Any, expected: Any) -> None:
        for mine, other in zip(tensors_in(output), tensors_in(expected), strict=True):
            for a, b in zip(record.labels(mine), record.labels(other), strict=True):
                if a.size == b.size:
                    unify(a, b, SIBLING)
                else:
                    pin(a, SIBLING)
                    pin(b, SIBLING)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Return what two modules that do the same have in common: their class and their parameters' shapes."""
    return (type(module), *((name, tuple(t.shape)) for name, t in module.state_dict().items()))


def training(
    model: nn.Module, state: Mapping[str, torch.Tensor], record: Record, run: Callable[[], None]
) -> None:
    """Run the model in training mode if parameters have not been read yet; what fails there has shown nothing."""
    if not record.unread_tensors(state):
        return
    modes = [module.training for module in model.modules()]
    record.exchangeable = True
    try:
        model.train()
        run()
    except Exception:  # whatever the model's own code needs in training: targets, larger batches
        return
    finally:
        record.exchangeable = False
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
