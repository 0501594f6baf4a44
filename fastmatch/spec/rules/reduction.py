"""Reductions, softmax and cumulative operations along axes."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record
from fastmatch.spec.rules.registry import rule

__all__: list[str] = []


def _dims(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "prod", "any", "all",
)  # fmt: skip
def _reduce(record: Record, call: Call) -> None:
    """A reduction is symmetric in the axes it reduces, so nothing is united."""
    labels = record.labels(call["self"])
    if call.out.ndim == 0:
        record.set(call.out, [])
        return
    reduced = {d % len(labels) for d in _dims(call.get("dim"))} or set(range(len(labels)))
    kept = [Label(1) if d in reduced else label for d, label in enumerate(labels)]
    if call.out.ndim != len(labels):
        kept = [label for d, label in enumerate(kept) if d not in reduced]
    record.set(call.out, kept)


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    record.mix(labels, {call.dim(len(labels))})
    record.set(call.out, labels)  # symmetric along its axis


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff")
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
