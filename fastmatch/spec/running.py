"""How models are run for a trace or a comparison: their inputs, their outputs, their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from fastmatch._internal.callers import is_own_error
from fastmatch._internal.checks import check_choice
from fastmatch._internal.eager import eagerly
from fastmatch._internal.modules import to_eval_mode
from fastmatch._internal.randomness import random_numbers_kept
from fastmatch._internal.wrapped_buffers import buffers_sent_once

__all__ = [
    "Examples",
    "Experts",
    "Outputs",
    "arguments_of",
    "buffers_kept",
    "check_not_batches",
    "copies_of",
    "examples_of",
    "examples_that_run",
    "outputs_named",
    "plain_operations",
    "tensors_returned",
    "untouched",
]

Outputs: TypeAlias = Sequence[str] | Callable[[Any], Sequence[str] | None] | None
"""Names of a model's outputs, or a function that chooses them from what it returned; None for all."""

Experts: TypeAlias = Literal["batched_mm", "eager"]
"""How transformers computes a mixture of experts; see :func:`plain_operations`."""

PLAIN_SETTINGS = {"use_cache": False}
"""Caches of keys and values would be outputs, and their order would be kept."""


@contextmanager
def plain_operations(model: nn.Module | None = None, experts: Experts = "batched_mm") -> Iterator[None]:
    """Make models use ordinary operations instead of fused ones, and return no caches.

    Compiled code runs as it was written. Torch's attention modules leave their fast path, and its recurrent layers cuDNN. Transformers' mixtures of experts run as ``experts`` says:
    ``"batched_mm"`` computes the experts of every token in one product, which a trace can follow; ``"eager"``
    loops over the experts in use, which gives the same outputs and copies no weights.
    """
    check_choice("experts", experts, Experts)
    enabled, cudnn = torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled
    before = _settings(model)
    torch.backends.mha.set_fastpath_enabled(False)
    if model is not None and any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False  # it packs all weights of a recurrent network into one operand
    for config, name, _ in before:
        setattr(config, name, PLAIN_SETTINGS.get(name, experts))
    try:
        with eagerly(), buffers_sent_once(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        torch.backends.cudnn.enabled = cudnn
        for config, name, value in before:
            setattr(config, name, value)


def _settings(model: nn.Module | None) -> list[tuple[Any, str, Any]]:
    """Return (config, name, present value) of every setting of a model that has to change."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for module in model.modules() if model is not None else ():
        config = getattr(module, "config", None)
        for name, kind in (("_experts_implementation_internal", str), ("use_cache", bool)):
            value = getattr(config, name, None)
            if isinstance(value, kind):
                found[id(config), name] = config, name, value
    return [*found.values()]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers at the end: some models count calls or average activations in every pass."""
    # A buffer made in inference mode cannot be written to outside of it.
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    names = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in names:
            for name, buffer in own.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer.shape == value.shape and (buffer._version != version or _differs(buffer, value)):
                    buffer.copy_(value)


def _differs(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether an ordinary tensor was changed: batch norm updates its statistics without a new version of them."""
    is_ordinary = type(buffer) is torch.Tensor and buffer.layout == torch.strided and not buffer.is_meta
    return is_ordinary and not torch.equal(buffer, value)


@contextmanager
def examples_that_run() -> Iterator[None]:
    """Turn an error of a model into one that names ``example_inputs``; our own errors and those of memory pass."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        if not isinstance(error, RuntimeError) and is_own_error(error):
            raise
        told = f"example_inputs: the model does not run on them ({error})"
        if not isinstance(error, TypeError):
            raise ValueError(told) from error
        raise TypeError(f"{told}; {ARGUMENTS}" if "argument" in str(error) else told) from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; restore training flags, buffers and random states, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        to_eval_mode(model)
        with (
            torch.inference_mode(False), torch.no_grad(), random_numbers_kept(), plain_operations(model), buffers_kept(model),
        ):  # fmt: skip
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def copies_of(value: Any) -> Any:
    """Return nested inputs with copies of the tensors, for a model that may write to its inputs."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: copies_of(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copies_of, value))
    if type(value) in (list, tuple):
        return type(value)(map(copies_of, value))
    return value


ARGUMENTS = "a tuple or a list holds the model's positional arguments, a dict those by name; several examples are fm.Examples(x, y)"

ONE_BATCH = (
    "example_inputs: expected the inputs of one batch, got {}; give the inputs of its first batch here, "
    "and the loader to a matcher, such as fm.ActivationMatching(loader)"
)


class Examples:
    """Several example inputs of one model, for a model whose forward pass depends on its inputs.

    Where a function takes ``example_inputs``, it takes these as well: a trace joins what each of them shows, and a
    proof runs on each.

    Example:
        >>> spec = fm.PermutationSpec.trace(model_a, fm.Examples(x, x[:1]))
        >>> spec.groups == fm.PermutationSpec.trace(model_a, x).groups
        True

    Args:
        inputs: each a tensor, a tuple of positional inputs, or a mapping of keyword inputs.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, *inputs: Any) -> None:
        if not inputs:
            raise ValueError("inputs: expected at least one example, got none")
        self.inputs = inputs


def examples_of(
    example_inputs: Any, kwargs: Mapping[str, Any] | None
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the positional and keyword arguments of every example; ``kwargs`` are given to all.

    Raises:
        TypeError: they are a DataLoader.
    """
    if isinstance(example_inputs, torch.utils.data.DataLoader):
        raise TypeError(ONE_BATCH.format("a DataLoader"))
    if not isinstance(example_inputs, Examples):
        return [arguments_of(example_inputs, kwargs)]
    found = [arguments_of(inputs, None) for inputs in example_inputs.inputs]
    return [(args, {**keywords, **(kwargs or {})}) for args, keywords in found]


def check_not_batches(example_inputs: Any, error: Exception) -> None:
    """Raise TypeError if inputs that a model does not run on, for an error, look like batches of (inputs, classes)."""
    if _is_batch(example_inputs) and isinstance(error, TypeError) and "argument" in str(error):
        raise TypeError(
            "example_inputs: expected the inputs of one batch, got what looks like (inputs, targets); give the inputs alone, batch[0]"
        )
    if isinstance(example_inputs, list) and example_inputs and all(map(_is_batch, example_inputs)):
        raise TypeError(ONE_BATCH.format("a list of batches"))


def _is_batch(value: Any) -> bool:
    """Whether this could be (inputs, classes); inputs and their lengths look alike."""
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        return False
    x, y = value
    tensors = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return tensors and y.ndim == 1 and not y.is_floating_point() and x.ndim > 1 and len(x) == len(y)


def arguments_of(
    example_inputs: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments of the model; the first of several examples."""
    if isinstance(example_inputs, Examples):
        return arguments_of(example_inputs.inputs[0], kwargs)
    if isinstance(example_inputs, Mapping) and kwargs is None:
        return (), dict(example_inputs)
    args = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if example_inputs is None:
        args = ()
    return tuple(args), dict(kwargs or {})


def tensors_returned(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Return the tensors in a model's output: in containers, dataclasses, and objects with attributes or slots."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (nn.Module, type, ModuleType)):
        return []
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        parts += [getattr(value, s, None) for s in ([slots] if isinstance(slots, str) else slots)]
    parts += getattr(value, "__dict__", {}).values()
    return [t for part in parts for t in tensors_returned(part, seen)]


def outputs_named(output: Any, names: Sequence[str] | None) -> list[torch.Tensor]:
    """Return the tensors of a model's output: all, or those of the attributes or keys ``names``.

    Raises:
        ValueError: the output has no such attribute or key.
    """
    if names is None:
        return tensors_returned(output)
    found = []
    for name in names:
        part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if part is None:
            raise ValueError(
                f"outputs: {name!r} is not in what the model returned, a {type(output).__name__}"
            )
        found += tensors_returned(part)
    return found
