"""Check that two checkpoints are the same function, with the parameters of one module in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch._internal.checks import check_limit
from fastmatch._internal.states import check_same_architecture, prefix_of
from fastmatch.checkpoint.diffusion.pipeline import networks_of
from fastmatch.checkpoint.diffusion.single_file import running_means
from fastmatch.checkpoint.names import Chunk, RenamedCheckpoint, layout_of, layout_without
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.same_model import check_same_sizes
from fastmatch.checkpoint.structure import build_empty, compared, config_inputs
from fastmatch.checkpoint.tracing import is_diffusion, models_of, take_names
from fastmatch.permutations.precise import Wide
from fastmatch.spec.running import arguments_of, examples_that_run, outputs_named, plain_operations

__all__ = ["CheckpointVerification", "DifferentFunction", "verify_checkpoints"]


State: TypeAlias = "Checkpoint | RenamedCheckpoint"
"""What a model's parameters are read from, by their names."""


class DifferentFunction(ValueError):
    """Two checkpoints are not the same function.

    Attributes:
        error: largest difference of an output, relative to its largest value; None if a tensor differs that no network reads.
    """

    error: float | None = None
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

    Without ``model``, tensors that no network reads must be equal: a safety checker of a pipeline, layers that a library
    runs after the model. The running mean of a UNet's weights in its file is run like the UNet. Where the files hold a tied tensor
    under several names with different numbers, the model runs once with each.

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
        ValueError: the outputs or tensors that no network reads differ, the checkpoints do not fit the model, there is no
            network or no finite output to compare, or inputs are given without ``model``.

    Memory: a parameter is read on demand and dropped when its module has run. The peak is therefore the largest module
    in ``dtype`` plus activations, whatever the size of the model. Of a diffusion model it is the largest network.
    """
    check_limit("tolerance", tolerance)
    if model is None and (example_inputs is not None or kwargs is not None):
        raise ValueError(
            "example_inputs: expected a model to run them on; without one the inputs follow the config"
        )
    a, b = Checkpoint(path_a), Checkpoint(path_b)
    check_same_sizes(a, b)
    take_names(b, a)
    check_same_architecture(a.headers, b.headers, str(path_a), str(path_b))
    if model is not None:
        own = (_without_prefix(model, a), _without_prefix(model, b))
        with examples_that_run():
            return _verify(model, own, arguments_of(example_inputs, kwargs), dtype, tolerance)
    if a.parts:
        return _verify_pipeline(a, b, dtype, tolerance)
    if is_diffusion(path_a, a):
        return _verify_diffusion(a, b, dtype, tolerance)
    model = build_empty(path_a)
    layout = layout_of(model, a.headers, str(path_a))
    states = RenamedCheckpoint(a, layout), RenamedCheckpoint(b, layout)
    own = model.state_dict().keys()
    _check_carried(a, b, (name for name, chunk in layout.items() if chunk.parameter not in own))
    return _verify(model, states, ((), config_inputs(model)), dtype, tolerance)


def _without_prefix(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint | RenamedCheckpoint:
    """Return a checkpoint under the names of the model, of which all have a prefix such as ``module.`` in some files."""
    prefix = prefix_of(model.state_dict(), checkpoint.headers)
    if not prefix or not all(name.startswith(prefix) for name in checkpoint.headers):
        return checkpoint
    return RenamedCheckpoint(checkpoint, layout_without(prefix, checkpoint.headers))


def _verify_pipeline(
    a: Checkpoint, b: Checkpoint, dtype: torch.dtype, tolerance: float
) -> CheckpointVerification:
    """Compare the networks of two pipelines one by one, and what belongs to none entry by entry."""
    known = [name for name, _ in networks_of(a.parts)]
    if not known:
        raise ValueError(
            f"{a.path}: none of its folders ({', '.join(a.parts)}) holds a network of a known class, so there is nothing to run; "
            "compare the folder of a network, with model= and example_inputs="
        )
    others = (part for part in a.parts if part not in known)
    _check_carried(a, b, (f"{part}.{name}" for part in others for name in a.parts[part]))
    return _joined([
        verify_checkpoints(a.parts[name].path, b.parts[name].path, dtype=dtype, tolerance=tolerance)
        for name in known
    ])  # fmt: skip


def _verify_diffusion(
    a: Checkpoint, b: Checkpoint, dtype: torch.dtype, tolerance: float
) -> CheckpointVerification:
    """Compare the networks of two files one by one, because each is read whole, and what belongs to none entry by entry."""
    shapes = {name: tuple(tensor.shape) for name, tensor in a.headers.items()}
    rest, found = set(a), []
    for network in models_of(a):
        names = dict(network.named_parameters()).keys()
        means = running_means(names, shapes)
        rest -= {*names, *means.values()}
        pairs: list[tuple[State, State]] = [(a, b)]
        if means:
            layout = {means.get(name, name): Chunk(name, a.headers[name].shape) for name in names}
            pairs.append((RenamedCheckpoint(a, layout), RenamedCheckpoint(b, layout)))
        found += [_verify(network, pair, (network.examples, {}), dtype, tolerance) for pair in pairs]
    _check_carried(a, b, sorted(rest))
    return _joined(found)


def _check_carried(a: Checkpoint, b: Checkpoint, names: Iterable[str]) -> None:
    """Compare tensors that no network reads, one in memory at a time of each checkpoint.

    Raises:
        DifferentFunction: one of them differs. Another element type alone, which rounds it, is no difference.
    """
    for name in names:
        old, new = a[name], b[name]
        if not torch.equal(_bytes(old.to(new.dtype)), _bytes(new)):
            raise DifferentFunction(
                f"{b.path}: tensor {name!r} differs from that of {a.path}, and it belongs to no network that can be run to "
                "compare the functions"
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _verify(
    model: nn.Module, states: Sequence[State], inputs: tuple[Any, Any], dtype: torch.dtype, tolerance: float
) -> CheckpointVerification:
    """Run a model with the tensors of both checkpoints and compare the outputs, once for each copy of tied tensors."""
    return _joined(
        [_verify_copy(model, states, inputs, dtype, tolerance, k) for k in range(_copies(model, states))]
    )


def _copies(model: nn.Module, states: Sequence[State]) -> int:
    """Return how many copies of a tied tensor are to be run: 1 if those of each checkpoint are equal."""
    most = 1
    for state in states:
        for names in _held(_places(model), state).values():
            first, *others = names
            if others and any(not _equal(state[first], state[name]) for name in others):
                most = max(most, len(names))
    return most


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors hold the same numbers, also in two element types. Signs of zero and NaNs count."""
    if one.dtype != other.dtype and one.is_floating_point() and other.is_floating_point():
        wider = torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
        one, other = one.to(wider), other.to(wider)
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _verify_copy(
    model: nn.Module,
    states: Sequence[State],
    inputs: tuple[Any, Any],
    dtype: torch.dtype,
    tolerance: float,
    copy: int,
) -> CheckpointVerification:
    """Run a model with the tensors of both checkpoints, and of tied ones with that copy, and compare the outputs."""
    args = tuple(_cast(x, dtype) for x in inputs[0])
    keywords = {k: _cast(v, dtype) for k, v in inputs[1].items()}
    old, new = (_run(model, state, args, keywords, dtype, copy) for state in states)
    path_a, path_b = (state.path for state in states)
    told = f", run with copy {copy + 1} of tied tensors" if copy else ""
    if not any(bool(torch.isfinite(t).any()) for t in old):
        raise ValueError(
            f"{path_a}: the model returns {'no finite number' if old else 'no tensor'} on the inputs{told}, so there is nothing to compare"
        )
    error = max(_difference(x, y) for x, y in zip(old, new, strict=True))
    if not error <= tolerance:
        different = DifferentFunction(
            f"{path_b}: is not the same function as {path_a}{told}: outputs differ by {error:.2g} relative, "
            f"at most {tolerance:.2g} is allowed{_other_types(states)}"
        )
        different.error = error
        raise different
    return CheckpointVerification(error, len(old))


def _other_types(states: Sequence[State]) -> str:
    """Return what an error adds where the checkpoints have other element types, of which one rounds more."""
    types = [{t.dtype for t in state.headers.values() if t.is_floating_point()} for state in states]
    if types[0] == types[1]:
        return ""
    said = [" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found)) for found in types]
    rounding = max(torch.finfo(dtype).eps for found in types for dtype in found)
    return (
        f". They are of {said[0]} and of {said[1]}, whose rounding alone makes outputs differ by some {rounding:.0e}: compare files of one "
        "type, or allow for it by the tolerance"
    )


def _joined(found: list[CheckpointVerification]) -> CheckpointVerification:
    return CheckpointVerification(max(one.error for one in found), sum(one.outputs for one in found))


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
    model: nn.Module, state: State, args: Any, kwargs: Any, dtype: torch.dtype, copy: int
) -> list[torch.Tensor]:
    wide = Wide() if dtype == torch.float64 else nullcontext()
    with torch.no_grad(), plain_operations(model, "eager"), _read_on_demand(model, state, dtype, copy), wide:
        returned = model(*args, **kwargs)
        outputs = outputs_named(returned, compared(returned))
    return [t.detach().to(torch.float64, copy=True) for t in outputs]


@contextmanager
def _read_on_demand(model: nn.Module, state: State, dtype: torch.dtype, copy: int) -> Iterator[None]:
    """Inside, read a parameter from ``state`` when it is accessed and drop it when its module has run.

    Reading on access, not before the module runs, also serves modules that read the parameters of another module
    without calling it. At the end the model's own parameters are restored.
    """
    names = _names(model, state, copy)
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


def _names(model: nn.Module, state: State, copy: int) -> dict[tuple[int, str], str]:
    """Return (module id, own name) -> name in the checkpoint. Tied tensors share a name: of those that it has, the one at ``copy``, or the last."""
    names: dict[tuple[int, str], str] = {}
    places = _places(model)
    tied = {key: found[min(copy, len(found) - 1)] for key, found in _held(places, state).items()}
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


Place: TypeAlias = tuple[nn.Module, str, str, torch.Tensor]
"""A module, its own name of a tensor, the model's name of it, and the tensor."""


def _places(model: nn.Module) -> list[Place]:
    """Return every place of a parameter or buffer; a tied one has several."""
    return [
        (module, key, f"{prefix}.{key}" if prefix else key, tensor)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    ]


def _held(places: Sequence[Place], state: State) -> dict[int, list[str]]:
    """Return the names that the checkpoint has for each tensor of the model, by its id."""
    held: dict[int, list[str]] = {}
    for _, _, name, tensor in places:
        if name in state:
            held.setdefault(id(tensor), []).append(name)
    return held
