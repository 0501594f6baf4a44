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
    inputs_split, filters_split = (split_groups(x, call["groups"]) for x in (inputs[channel], weight[0]))
    if inputs_split is None or filters_split is None:
        pin_all(record, call, call.name)
        return
    result = unite(record, call, inputs_split, filters_split, weight)
    record.contract(inputs[channel])
    record.contract(result)
    if call["bias"] is not None:
        unify(result, record.labels(call["bias"])[0], call.name)
    labels = [*inputs[:channel], result, *fresh(call.out.shape[channel + 1 :], spatial)]
    record.mark_contracted(weight[0] if call["transposed"] else weight[1])
    record.mark_consumed(call, "input", channel)
    record.mark_produced(call, labels, channel)
    record.set(call.out, labels)


def _unite_plain(
    record: Record, call: Call, inputs: list[Label], filters: list[Label], weight: list[Label]
) -> Label:
    """Return the label of the output channels of a kernel (out, in / groups, ...). Pairs are (groups, per group)."""
    unify(inputs[0], filters[0], call.name)
    unify(inputs[1], weight[1], call.name)
    record.contract(weight[1], [filters[0]])
    return weight[0]


def _unite_transposed(
    _record: Record, call: Call, inputs: list[Label], filters: list[Label], weight: list[Label]
) -> Label:
    """Return the label of the output channels of a kernel (in, out / groups, ...). Pairs are (groups, per group)."""
    for mine, label in zip(inputs, filters, strict=True):
        unify(mine, label, call.name)
    return product([inputs[0], weight[1]])
