"""Batch, layer, RMS, group and weight normalization."""

from __future__ import annotations

import torch

from fastmatch.spec.labels import Label, pin, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule, set_saved, split_groups, unify_broadcast

__all__: list[str] = []


def _kept(labels: list[Label], tensor: torch.Tensor) -> list[Label]:
    """Return the labels for a statistic: those of the axes it keeps, new ones for the axes it reduces."""
    return [x if x.size == n else Label(n) for x, n in zip(labels, tensor.shape, strict=True)]


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
)  # fmt: skip
def _batch_norm(record: Record, call: Call) -> None:
    labels = record.labels(call["input"])
    channel = labels[1] if len(labels) > 1 else labels[0]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.get(name) is not None:
            unify(channel, record.labels(call[name])[0], call.name)
    first, *saved = call.outputs
    record.set(first, labels)
    for tensor in saved:
        if tensor.ndim == 1 and tensor.shape[0] == channel.size:
            record.set(tensor, [channel])
        else:
            set_saved(record, call, [tensor], labels)


@rule("native_layer_norm")
def _layer_norm(record: Record, call: Call) -> None:
    labels = record.labels(call["input"])
    count = len(call["normalized_shape"])
    record.mix(labels, set(range(len(labels) - count, len(labels))))
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            for mine, label in zip(labels[-count:], record.labels(call[name]), strict=True):
                unify(mine, label, call.name)
    first, *saved = call.outputs
    record.set(first, labels)
    for tensor in saved:
        record.set(tensor, _kept(labels, tensor))


@rule("native_group_norm")
def _group_norm(record: Record, call: Call) -> None:
    labels = record.labels(call["input"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(labels[1], record.labels(call[name])[0], call.name)
    split = split_groups(labels[1], call["group"])
    if split is None:
        pin(labels[1], call.name)
        split = fresh((call["group"], labels[1].size // call["group"]), call.name)
    record.contract(split[0])
    first, *saved = call.outputs
    record.set(first, labels)
    for tensor in saved:
        record.set(tensor, [labels[0], split[0]])


@rule("_weight_norm_interface")
def _weight_norm(record: Record, call: Call) -> None:
    labels = record.labels(call["v"])
    unify_broadcast(record, call["g"], labels, call.name)
    for tensor in call.outputs:
        record.set(tensor, _kept(labels, tensor))
    record.contract(labels[call.dim(len(labels))])
