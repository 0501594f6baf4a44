"""Check that two checkpoints are the same function, with the parameters of one module in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.states import check_same_architecture
from fastmatch.checkpoint.diffusion.pipeline import networks_of
from fastmatch.checkpoint.names import RenamedCheckpoint, layout_of
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import build_empty, compared, config_inputs
from fastmatch.checkpoint.tracing import is_diffusion, models_of
from fastmatch.permutations.precise import Wide
from fastmatch.spec.running import arguments_of, outputs_named, plain_operations

__all__ = ["CheckpointVerification", "DifferentFunction", "verify_checkpoints"]


class DifferentFunction(ValueError):
    """Two checkpoints are not the same function."""

    exit_status = 3
    """Of the command, so that a script can tell this answer from a wrong call."""


@dataclass(frozen=True)
class CheckpointVerification:
    """The result of :func:`verify_checkpoints`.

    Attributes:
        error: largest difference of an output, relative to its largest value.
        outputs: number of outputs compared.
    """

    error: float
    outputs: int


def verify_checkpoints(
    path_a: str | Path,
    path_b: str | Path,
    *,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-9,
) -> CheckpointVerification:
    """Run two checkpoints on the same random inputs and compare every output.

    Example:
        >>> from fastmatch.checkpoint import align_checkpoints, verify_checkpoints
        >>> alignment = align_checkpoints("model-a", "model-b", "model-b-aligned")
        >>> verify_checkpoints("model-b", "model-b-aligned").error < 1e-9
        True

    Args:
        path_a, path_b: directories or files with tensors of the same names and shapes.
        model: a module of that architecture, which is not changed. By default it is built from A's config.json, or the networks of
            a diffusion model from the names and shapes in its file.
        example_inputs: positional inputs of ``model``: a tensor or a tuple. Not used without ``model``; the inputs are
            then random and follow the config.
        kwargs: keyword inputs of ``model``.
        dtype: the type that the forward passes run in.
        tolerance: largest difference allowed, relative to the largest value of the output.

    Raises:
        ValueError: the outputs differ, the checkpoints do not fit the model, or inputs are given without ``model``.

    Memory: a parameter is read on demand and dropped when its module has run. The peak is therefore the largest module
    in ``dtype`` plus activations, whatever the size of the model. Of a diffusion model it is the largest network.
    """
    if model is None and (example_inputs is not None or kwargs is not None):
        raise ValueError(
            "example_inputs: expected a model to run them on; without one the inputs follow the config"
        )
    a, b = Checkpoint(path_a), Checkpoint(path_b)
    check_same_architecture(a.headers, b.headers, str(path_a), str(path_b))
    if model is None and a.parts:
        pairs = [(part.path, b.parts[name].path) for name, part in networks_of(a.parts)]
        return _joined([verify_checkpoints(*pair, dtype=dtype, tolerance=tolerance) for pair in pairs])
    if model is None and is_diffusion(path_a, a):
        # One after the other: each is read whole.
        return _joined([
            verify_checkpoints(path_a, path_b, model=network, example_inputs=network.examples, dtype=dtype, tolerance=tolerance)
            for network in models_of(a)
        ])  # fmt: skip
    states: list[Checkpoint | RenamedCheckpoint] = [a, b]
    if model is None:
        model = build_empty(path_a)
        example_inputs, kwargs = (), config_inputs(model)
        layout = layout_of(model, a.headers, str(path_a))
        states = [RenamedCheckpoint(checkpoint, layout) for checkpoint in (a, b)]
    args, keywords = arguments_of(example_inputs, kwargs)
    args = tuple(_cast(x, dtype) for x in args)
    keywords = {k: _cast(v, dtype) for k, v in keywords.items()}
    old, new = (_run(model, c, args, keywords, dtype) for c in states)
    error = max((_difference(x, y) for x, y in zip(old, new, strict=True)), default=float("inf"))
    if not error <= tolerance:
        raise DifferentFunction(
            f"{path_b}: is not the same function as {path_a}: outputs differ by {error:.2g} relative, "
            f"at most {tolerance:.2g} is allowed"
        )
    return CheckpointVerification(error, len(old))


def _joined(found: list[CheckpointVerification]) -> CheckpointVerification:
    return CheckpointVerification(
        max((one.error for one in found), default=0.0), sum(one.outputs for one in found)
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _difference(old: torch.Tensor, new: torch.Tensor) -> float:
    if old.shape != new.shape or not bool(torch.isfinite(old).all() and torch.isfinite(new).all()):
        # Masks are minus infinity in both: entries that are not finite must be equal.
        same = old.shape == new.shape and torch.equal(old.nan_to_num(), new.nan_to_num())
        return 0.0 if same else float("inf")
    if not old.numel():
        return 0.0
    return float((old - new).abs().max()) / max(float(old.abs().max()), 1e-30)


def _run(
    model: nn.Module, state: Checkpoint | RenamedCheckpoint, args: Any, kwargs: Any, dtype: torch.dtype
) -> list[torch.Tensor]:
    wide = Wide() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), plain_operations(model, "eager"), _read_on_demand(model, state, dtype), wide:
        returned = model(*args, **kwargs)
        outputs = outputs_named(returned, compared(returned))
    return [t.detach().to(torch.float64, copy=True) for t in outputs]


@contextmanager
def _read_on_demand(
    model: nn.Module, state: Checkpoint | RenamedCheckpoint, dtype: torch.dtype
) -> Iterator[None]:
    """Inside, read a parameter from ``state`` when it is accessed and drop it when its module has run.

    Reading on access, not before the module runs, also serves modules that read the parameters of another module
    without calling it. At the end the model's own parameters are restored.
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


def _names(model: nn.Module, state: Checkpoint | RenamedCheckpoint) -> dict[tuple[int, str], str]:
    """Return (module id, own name) -> name in the checkpoint. Tied parameters share the name that the checkpoint has."""
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
