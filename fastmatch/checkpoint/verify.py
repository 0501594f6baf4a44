"""Proof that two checkpoints are the same function, with one module's parameters in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import build_empty, config_inputs
from fastmatch.spec.trace import arguments_of, plain_operations, tensors_returned
from fastmatch.states import check_same_architecture

__all__ = ["CheckpointVerification", "verify_checkpoints"]


class _Wide(TorchFunctionMode):
    """Turns a model's own casts to float32 into casts to float64: norms and rotary tables are full of them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if not any(
            isinstance(x, torch.Tensor) for x in args
        ):  # a new tensor, such as one to read a file into
            return func(*args, **(kwargs or {}))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{k: widen(v) for k, v in (kwargs or {}).items()})


@dataclass(frozen=True)
class CheckpointVerification:
    """The largest difference of the outputs relative to the largest output, and the number of outputs."""

    error: float
    outputs: int


def verify_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> CheckpointVerification:
    """Runs both checkpoints on the same random inputs and compares every output.

    Example:
        >>> verify_checkpoints("model-b", "model-b-aligned")

    Args:
        a, b: directories or files with the same tensors.
        model: a module of that architecture, left as it is; built from A's config.json where left out.
        example_inputs, kwargs: its inputs; random tokens or pictures by the config where left out.
        dtype: what the computation runs in.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        ValueError: the outputs differ, or the checkpoints do not fit the model.

    Memory: a module's own parameters are read just before it runs and dropped after, so the peak is the
    largest module's in ``dtype`` plus activations, whatever the model's size.
    """
    first, second = Checkpoint(a), Checkpoint(b)
    check_same_architecture(first.headers, second.headers, str(a), str(b))
    if model is None:
        model = build_empty(a)
        example_inputs, kwargs = (), config_inputs(model)
    args, keywords = arguments_of(example_inputs, kwargs)
    args = tuple(_cast(x, dtype) for x in args)
    keywords = {k: _cast(v, dtype) for k, v in keywords.items()}
    old, new = (_run(model, c, args, keywords, dtype) for c in (first, second))
    error = max((_difference(x, y) for x, y in zip(old, new, strict=True)), default=float("inf"))
    if not error <= tolerance:
        raise ValueError(
            f"{b}: is not the same function as {a}: outputs differ by {error:.2g} relative, "
            f"at most {tolerance:.2g} is allowed"
        )
    return CheckpointVerification(error, len(old))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _difference(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape or not bool(torch.isfinite(old).all() and torch.isfinite(new).all()):
        # Masks are minus infinity on both sides: what is not finite must be the same.
        same = old.shape == new.shape and torch.equal(old.nan_to_num(), new.nan_to_num())
        return 0.0 if same else float("inf")
    if not old.numel():
        return 0.0
    return float((old - new).abs().max()) / max(float(old.abs().max()), 1e-30)


def _run(
    model: nn.Module, state: Checkpoint, args: Any, kwargs: Any, dtype: torch.dtype
) -> list[torch.Tensor]:
    wide = _Wide() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), plain_operations(), _streamed(model, state, dtype), wide:
        outputs = tensors_returned(model(*args, **kwargs))
    return [t.detach().to(torch.float64, copy=True) for t in outputs]


@contextmanager
def _streamed(model: nn.Module, state: Checkpoint, dtype: torch.dtype) -> Iterator[None]:
    """Inside, each module's parameters and buffers come from ``state`` while it runs; after, all is put back."""
    names = _names(model, state)
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in model.modules()]
    handles = []

    def load(module: nn.Module, *_: Any) -> None:
        for owner in _owners(module):
            for table in (owner._parameters, owner._buffers):
                for key in table:
                    name = names.get((id(owner), key))
                    if name is not None:
                        tensor = _cast(state[name], dtype)
                        is_parameter = table is owner._parameters
                        table[key] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor

    def drop(module: nn.Module, *_: Any) -> None:
        for owner in _owners(module):
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    try:
        model.eval()
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = _cast(buffer, dtype)
            handles.append(module.register_forward_pre_hook(load))
            handles.append(module.register_forward_hook(drop))
            drop(module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, parameters, buffers, training in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.training = training


def _owners(module: nn.Module) -> list[nn.Module]:
    """Whose parameters a module's forward reads: its own; torch's attention also reads its projection's."""
    return list(module.modules()) if isinstance(module, nn.MultiheadAttention) else [module]


def _names(model: nn.Module, state: Checkpoint) -> dict[tuple[int, str], str]:
    """(module, own name) -> name in the checkpoint; tied parameters share the one that is there."""
    names: dict[tuple[int, str], str] = {}
    tied: dict[int, str] = {}
    places = [
        (module, key, f"{prefix}.{key}" if prefix else key, tensor)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]
    for _, _, name, tensor in places:
        if name in state:
            tied.setdefault(id(tensor), name)
    for module, key, name, tensor in places:
        if id(tensor) in tied:
            found = tied[id(tensor)]
            if state.headers[found].shape != tensor.shape:
                raise ValueError(
                    f"{state.path}: tensor {found!r} has shape {tuple(state.headers[found].shape)}, "
                    f"the model's has {tuple(tensor.shape)}"
                )
            names[id(module), key] = found
        elif key in module._parameters:
            raise ValueError(f"{state.path}: has no tensor {name!r}, which the model has")
    return names
