"""Reductions, softmax and cumulative operations along axes."""

from __future__ import annotations

import torch

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import broadcast_labels, rule

__all__: list[str] = []


def _dims(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "prod", "any", "all",
    "aminmax", "count_nonzero", "nansum", "std_mean", "var_mean",
)  # fmt: skip
def _reduce(record: Record, call: Call) -> None:
    """A reduction is symmetric in the axes it reduces, so nothing is united."""
    labels = record.labels(call["self"])
    reduced = {d % max(len(labels), 1) for d in _dims(call.get("dim"))} or set(range(len(labels)))
    for out in call.outputs:
        kept = [Label(1) if d in reduced else label for d, label in enumerate(labels)]
        if out.ndim != len(labels):
            kept = [label for d, label in enumerate(kept) if d not in reduced]
        record.set(out, kept)


@rule(
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "dist", "huber_loss", "mse_loss", "smooth_l1_loss",
    "soft_margin_loss",
)  # fmt: skip
def _loss(record: Record, call: Call) -> None:
    """Operands are compared position by position; the result has every position, or is symmetric in them."""
    shape = torch.broadcast_shapes(*[t.shape for t in call.inputs])
    labels = broadcast_labels(record, call.inputs, shape, call.name)
    record.set(call.out, labels if call.out.shape == shape else [])


@rule("bincount", "histc")
def _counted(record: Record, call: Call) -> None:
    """What is counted is symmetric; the bins are not."""
    if call.get("weights") is not None:
        unify(record.labels(call["self"])[0], record.labels(call["weights"])[0], call.name)
    record.set(call.out, fresh(call.out.shape, call.name))


@rule("renorm")
def _renorm(record: Record, call: Call) -> None:
    """A norm over the axes beside ``dim``, in which it is symmetric."""
    labels = record.labels(call["self"])
    record.mix(labels, set(range(len(labels))) - {call.dim(len(labels))})
    record.set(call.out, labels)


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    record.mix(labels, {call.dim(len(labels))})
    record.set(call.out, labels)  # symmetric along its axis


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(record: Record, call: Call) -> None:
    labels = broadcast_labels(record, [call["grad_output"], call["output"]], call.out.shape, call.name)
    record.mix(labels, {call.dim(len(labels))})
    record.set(call.out, labels)


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def _cumulative(record: Record, call: Call) -> None:
    _ordered(record, call, _dims(call["dim"]))


@rule("flip", "roll")
def _reordered(record: Record, call: Call) -> None:
    _ordered(record, call, _dims(call["dims"]))


def _ordered(record: Record, call: Call, dims: list[int]) -> None:
    """Pin the axes along which the order counts; all of them if none is named."""
    labels = record.labels(call["self"])
    for d in dims or range(len(labels)):
        pin(labels[d], call.name)
        record.mix(labels, {d % len(labels)})
    for tensor in call.outputs:
        kept = zip(labels, tensor.shape, strict=True)
        record.set(tensor, [x if x.size == n else Label(n, pinned=call.name) for x, n in kept])
