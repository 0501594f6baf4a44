"""Proof that two checkpoints are the same function, with one module's parameters in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.states import check_same_architecture
from fastmatch.checkpoint.names import UnderParameterNames, layout_of
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import build_empty, compared, config_inputs
from fastmatch.permutations.verify import Wide
from fastmatch.spec.running import arguments_of, outputs_named, plain_operations

__all__ = ["CheckpointVerification", "verify_checkpoints"]


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

    Memory: a parameter is read when it is asked for and dropped when its module has run, so the peak is the
    largest module's in ``dtype`` plus activations, whatever the model's size.
    """
    first, second = Checkpoint(a), Checkpoint(b)
    check_same_architecture(first.headers, second.headers, str(a), str(b))
    states: list[Checkpoint | UnderParameterNames] = [first, second]
    if model is None:
        model = build_empty(a)
        example_inputs, kwargs = (), config_inputs(model)
        layout = layout_of(model, first.headers, str(a))
        states = [UnderParameterNames(checkpoint, layout) for checkpoint in (first, second)]
    args, keywords = arguments_of(example_inputs, kwargs)
    args = tuple(_cast(x, dtype) for x in args)
    keywords = {k: _cast(v, dtype) for k, v in keywords.items()}
    old, new = (_run(model, c, args, keywords, dtype) for c in states)
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
    model: nn.Module, state: Checkpoint | UnderParameterNames, args: Any, kwargs: Any, dtype: torch.dtype
) -> list[torch.Tensor]:
    wide = Wide() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), plain_operations(model, "eager"), _streamed(model, state, dtype), wide:
        returned = model(*args, **kwargs)
        outputs = outputs_named(returned, compared(returned))
    return [t.detach().to(torch.float64, copy=True) for t in outputs]


@contextmanager
def _streamed(
    model: nn.Module, state: Checkpoint | UnderParameterNames, dtype: torch.dtype
) -> Iterator[None]:
    """Inside, a parameter comes from ``state`` when it is asked for, until its module has run; after, all is put back.

    Asked for, and not before its module runs: some modules read the parameters of another one that they never call.
    """
    names = _names(model, state)
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in model.modules()]
    handles = []
    plain = nn.Module.__getattr__

    def read(module: nn.Module, key: str) -> Any:
        value = plain(module, key)
        name = names.get((id(module), key))
        if name is None or not isinstance(value, nn.Parameter) or not value.is_meta:
            return value
        module._parameters[key] = nn.Parameter(_cast(state[name], dtype), requires_grad=False)
        return module._parameters[key]

    def drop(module: nn.Module, *_: Any) -> None:
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    owner._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    try:
        model.eval()
        drop(model)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                name = names.get((id(module), key))
                module._buffers[key] = _cast(buffer if name is None else state[name], dtype)
            handles.append(module.register_forward_hook(drop))
        nn.Module.__getattr__ = read  # type: ignore[method-assign]
        yield
    finally:
        nn.Module.__getattr__ = plain
        for handle in handles:
            handle.remove()
        for module, parameters, buffers, training in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.training = training


def _names(model: nn.Module, state: Checkpoint | UnderParameterNames) -> dict[tuple[int, str], str]:
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
