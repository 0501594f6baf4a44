"""Convolutions, plain, grouped and transposed."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin, product, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import pin_all, rule, split_groups

__all__: list[str] = []


@rule("convolution")
def _convolution(record: Record, call: Call) -> None:
    """Unite input channels and filters; spatial axes are pinned."""
    spatial = f"{call.name} (spatial)"
    inputs, weight = record.labels(call["input"]), record.labels(call["weight"])
    channel = len(inputs) - len(weight) + 1  # 1 with a batch dimension, 0 without
    for label in [*inputs[channel + 1 :], *weight[2:]]:
        pin(label, spatial)
    unite = _unite_transposed if call["transposed"] else _unite_plain
    result = unite(record, inputs[channel], weight, call)
    if result is None:
        pin_all(record, call, call.name)
        return
    record.contract(inputs[channel])
    if call["bias"] is not None:
        unify(result, record.labels(call["bias"])[0], call.name)
    labels = [*inputs[:channel], result, *fresh(call.out.shape[channel + 1 :], spatial)]
    record.mark_contracted(weight[0] if call["transposed"] else weight[1])
    record.mark_consumed(call, "input", channel)
    record.mark_produced(call, labels, channel)
    record.set(call.out, labels)


def _unite_plain(record: Record, channels: Label, weight: list[Label], call: Call) -> Label | None:
    """Return the label of the output channels of a kernel (out, in / groups, ...); None if it has none."""
    filters, per_group = weight[:2]
    inputs = split_groups(channels, call["groups"])
    outputs = split_groups(filters, call["groups"])
    if inputs is None or outputs is None:
        return None
    unify(inputs[0], outputs[0], call.name)
    unify(inputs[1], per_group, call.name)
    record.contract(per_group, [outputs[0]])
    return filters


def _unite_transposed(_record: Record, channels: Label, weight: list[Label], call: Call) -> Label | None:
    """Return the label of the output channels of a kernel (in, out / groups, ...); None if it has none."""
    filters, per_group = weight[:2]
    kernel = split_groups(filters, call["groups"])
    inputs = split_groups(channels, call["groups"])
    if inputs is None or kernel is None:
        return None
    for mine, label in zip(inputs, kernel, strict=True):
        unify(mine, label, call.name)
    return product([inputs[0], per_group])
