"""Batches of a data loader, and how a model runs on them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from fastmatch._internal.checks import check_integer
from fastmatch._internal.eager import eagerly
from fastmatch._internal.modules import to_eval_mode
from fastmatch._internal.padding import is_rows, is_text, padded
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.ranks import in_group, is_of_ranks
from fastmatch._internal.sequences import sequence_like

__all__ = [
    "Forward",
    "arguments_for",
    "batches_of",
    "check_data",
    "check_forward",
    "check_module",
    "collated",
    "default_forward",
    "described",
    "described_call",
    "evaluating",
    "prediction_of",
    "samples_in",
    "split_batch",
    "take_rows",
]

TARGETS = ("labels", "label")
"""The keys of a mapping that are targets, not inputs."""

PREDICTIONS = ("logits", "out", "last_hidden_state")
"""Where output objects hold what a loss compares: transformers' heads, torchvision's segmentation, base models."""

SAMPLE = (bool, int, float, str, Mapping)
"""What a list of samples holds, if no tensors."""

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""``forward(model, batch)`` runs the model on one item of the loader and returns the output."""


def check_module(model: object, argument: str) -> None:
    """Raise TypeError if ``model`` cannot be run, as a state dict cannot."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{argument}: expected a torch module, since it is run on data; got {type(model).__name__}"
        )


def collated(batch: Any) -> Any:
    """Return a list of mappings, one per sample, as one mapping of lists; any other batch as it is."""
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(sample, Mapping) for sample in batch):
        return {name: [sample[name] for sample in batch] for name in batch[0]}
    return batch


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return (inputs, targets) of one item; an item that is neither a pair nor a mapping with labels has no targets."""
    batch = collated(batch)
    if isinstance(batch, Mapping):
        targets = next((batch[name] for name in TARGETS if name in batch), None)
        return {k: v for k, v in batch.items() if k not in TARGETS}, targets
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise ValueError(
            f"data: expected inputs or (inputs, targets), or forward= for other batches; got {len(batch)} parts"
        )
    return batch, None


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: _to_device(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_device(v, device) for v in value]
    return value


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in [*model.parameters(), *model.buffers()][:1]:
        return tensor.device
    return torch.device("cpu")


def arguments_for(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments of the model, on its device.

    A tensor is one argument, a list several. A mapping, such as what a tokenizer returns, holds keyword arguments:
    lists become tensors, sequences of several lengths are padded, and texts are left out.
    """
    if isinstance(inputs, Mapping):
        inputs = padded({k: v for k, v in inputs.items() if not is_text(v)}, model)
    inputs = _to_device(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, list) else (inputs,)), {}


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on the inputs of ``batch``: a tensor, a list of inputs, or a mapping of keyword inputs.

    The keys ``"label"`` and ``"labels"`` of a mapping are not passed to the model; see :func:`arguments_for`.

    Raises:
        ValueError: the model does not run on this batch.
        RuntimeError: another rank failed, or does not answer.
    """
    args, kwargs = arguments_for(model, split_batch(batch)[0])
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        if is_of_ranks(error):
            raise
        raise ValueError(
            f"data: {type(model).__name__} does not run on a batch ({described_call(args, kwargs)}): {error}; expected what the model takes, "
            "or give forward="
        ) from error


def described_call(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the shapes and types of what a function is given, as they stand in a call."""
    return ", ".join([*map(described, args), *(f"{k}={described(v)}" for k, v in kwargs.items())])


def described(value: Any) -> str:
    """Return the shape and type of a tensor, the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def prediction_of(output: Any) -> Any:
    """Return the logits of a model's output object or mapping; any other output as it is."""
    for name in PREDICTIONS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    return output


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch: the rows of its first tensor or list.

    Raises:
        ValueError: the batch has neither.
    """
    first = _first_rows(collated(batch))
    if first is None:
        raise ValueError(
            f"data: cannot count the samples of a batch without tensors; got {type(batch).__name__}"
        )
    return len(first)


def _first_rows(value: Any) -> Any:
    """Return the first tensor with rows in nested containers; a list of numbers or of rows in a mapping counts too."""
    if isinstance(value, torch.Tensor):
        return value if value.ndim else None
    if isinstance(value, Mapping):
        rows = [v for v in value.values() if is_rows(v)]
        return rows[0] if rows else next((t for t in map(_first_rows, value.values()) if t is not None), None)
    parts = value if isinstance(value, (tuple, list)) else ()
    return next((t for t in map(_first_rows, parts) if t is not None), None)


def take_rows(value: Any, rows: Sequence[int], size: int) -> Any:
    """Return a batch of ``size`` samples with these alone, in every tensor and list that has ``size`` rows.

    Lists, tuples and a tokenizer's encodings keep their types; other mappings become dicts. What is given is not changed.
    """
    if isinstance(value, torch.Tensor):
        return value[list(rows)] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        taken = {k: _taken(v, rows, size) for k, v in value.items()}
        if not isinstance(value, UserDict):
            return taken
        found = copy.copy(value)
        found.data = {**value.data, **taken}
        return found
    if isinstance(value, list) and len(value) == size and all(isinstance(v, SAMPLE) for v in value):
        return [value[k] for k in rows]
    if isinstance(value, (tuple, list)):
        return sequence_like(value, [take_rows(v, rows, size) for v in value])
    return value


def _taken(value: Any, rows: Sequence[int], size: int) -> Any:
    """Return an entry of a mapping, where any list of numbers, texts or rows has one for each sample."""
    if isinstance(value, (list, tuple)) and (is_rows(value) or is_text(value)) and len(value) == size:
        return [value[k] for k in rows]
    if isinstance(value, np.ndarray) and value.ndim and len(value) == size:
        return value[list(rows)]
    return take_rows(value, rows, size)


def first_samples(data: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """Yield the batches of ``data`` up to ``samples`` samples, the last one cut; all batches for None."""
    if samples is None:
        yield from data
        return
    left = samples
    for batch in map(collated, data):
        size = samples_in(batch)
        yield batch if size <= left else take_rows(batch, range(left), size)
        left -= size
        if left <= 0:
            return


def check_forward(forward: object) -> None:
    """Raise TypeError unless ``forward`` is callable."""
    if not callable(forward):
        raise TypeError(f"forward: expected a function of a model and a batch, got {type(forward).__name__}")


def check_data(data: object, *, reads: int = 1) -> None:
    """Raise TypeError unless ``data`` is an iterable of batches that can be read ``reads`` times."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, Mapping)):
        raise TypeError(f"data: expected a loader or any iterable of batches, got {type(data).__name__}")
    if isinstance(data, torch.Tensor):
        raise TypeError("data: expected batches, got one tensor; give [tensor] or a loader")
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, torch.Tensor) for x in data):
        raise TypeError(
            "data: expected batches, got one pair of tensors; give [(inputs, targets)] or a loader"
        )
    if reads > 1 and isinstance(data, Iterator):
        raise TypeError(
            f"data: is read {reads} times, but an iterator (a generator, say) can be read only once; "
            "give a loader or a list of batches"
        )


def batches_of(
    data: Iterable[Any], title: str, *, samples: int | None = None, progress: bool | None = None
) -> Iterator[Any]:
    """Yield the items of ``data`` once, under a progress bar; all of them where a DistributedSampler has a rank's only.

    Args:
        data: a loader or any iterable of batches.
        title: of the progress bar.
        samples: stop after this many samples; None reads all.
        progress: show the bar; None shows it on a terminal.

    Raises:
        TypeError: ``data`` cannot be iterated, or is one tensor or one pair instead of batches.
        ValueError: ``data`` yields nothing, or ``samples`` is not a positive number.
    """
    if samples is not None:
        check_integer("samples", samples, least=1)
    check_data(data)
    if in_group():  # a rank's own samples would give every rank another result
        from fastmatch._internal.shared_data import whole_data

        data = whole_data(data)
    empty = True
    for batch in first_samples(progress_bar(data, title, show=progress), samples):
        empty = False
        yield batch
    if empty and isinstance(data, Sized) and not len(data):
        raise ValueError("data: yielded no batch; it is empty")
    if empty:
        raise ValueError(
            f"data: yielded no batch in the pass for {title}; a generator can be read only once, and an earlier pass "
            "of the same call may have read it: give a loader or a list of batches"
        )


@contextmanager
def evaluating(*models: nn.Module, compiled: bool = False) -> Iterator[None]:
    """Run in eval mode without gradients; restore the mode of every module afterwards.

    Compiled models run as they were written unless they may stay ``compiled``, because no hook is inside.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            to_eval_mode(model)
        with torch.no_grad(), nullcontext() if compiled else eagerly():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
