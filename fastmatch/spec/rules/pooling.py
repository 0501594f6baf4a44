"""Pooling, padding, resizing, sampling and rearranging of spatial axes."""

from __future__ import annotations

from fastmatch.spec.labels import Label, pin, product, split_product, unify
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import pin_all, rule

__all__: list[str] = []


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "reflection_pad1d",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "max_unpool2d", "max_unpool3d", "mkldnn_max_pool2d", "quantized_max_pool2d",
    "reflection_pad3d", "replication_pad3d",
)  # fmt: skip
def _spatial(record: Record, call: Call) -> None:
    """Keep the leading axes; pin the spatial ones, whose number is in the operation's name."""
    reason = f"{call.name} (spatial)"
    spatial = int(next(c for c in call.base if c in "123"))
    labels = record.labels(call.first)
    lead = len(labels) - spatial
    for tensor in call.inputs:
        for mine, label in zip(labels[:lead], record.labels(tensor)[:lead], strict=True):
            unify(mine, label, call.name)
        for label in record.labels(tensor)[lead:]:
            pin(label, reason)
    record.mix(labels, set(range(lead, len(labels))))
    for tensor in call.outputs:
        record.set(tensor, [*labels[:lead], *fresh(tensor.shape[lead:], reason)])


@rule("grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(record: Record, call: Call) -> None:
    """Every place of the grid reads all channels of its image."""
    labels, grid = record.labels(call["input"]), record.labels(call["grid"])
    unify(labels[0], grid[0], call.name)
    for label in [*labels[2:], grid[-1]]:
        pin(label, f"{call.name} (spatial)")
    record.mix(labels, set(range(2, len(labels))))
    record.set(call.out, [*labels[:2], *grid[1:-1]])


@rule("im2col")
def _patches(record: Record, call: Call) -> None:
    """The patches' axis is channels by places in the kernel."""
    labels = record.labels(call["self"])
    reason = f"{call.name} (spatial)"
    for label in labels[-2:]:
        pin(label, reason)
    record.mix(labels, {len(labels) - 2, len(labels) - 1})
    inner = Label(call.out.shape[-2] // labels[-3].size, pinned=reason)
    record.set(call.out, [*labels[:-3], product([labels[-3], inner]), *fresh(call.out.shape[-1:], reason)])


@rule("col2im")
def _image(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    reason = f"{call.name} (spatial)"
    channels = call.out.shape[-3]
    split = split_product([labels[-2]], [channels, labels[-2].size // channels])
    if split is None:
        pin_all(record, call, call.name)
        return
    for label in (split[1], labels[-1]):
        pin(label, reason)
    record.mix([*labels[:-2], *split, labels[-1]], {len(labels) - 1, len(labels)})
    record.set(call.out, [*labels[:-2], split[0], *fresh(call.out.shape[-2:], reason)])


@rule("pixel_shuffle")
def _pixel_shuffle(record: Record, call: Call) -> None:
    """Move two factors of the channels to the spatial axes."""
    labels, factor = record.labels(call["self"]), call["upscale_factor"]
    split = split_product([labels[-3]], [call.out.shape[-3], factor, factor])
    if split is None:
        pin_all(record, call, call.name)
        return
    channels, down, right = split
    record.set(call.out, [*labels[:-3], channels, product([labels[-2], down]), product([labels[-1], right])])


@rule("pixel_unshuffle")
def _pixel_unshuffle(record: Record, call: Call) -> None:
    labels, factor = record.labels(call["self"]), call["downscale_factor"]
    down = split_product([labels[-2]], [call.out.shape[-2], factor])
    right = split_product([labels[-1]], [call.out.shape[-1], factor])
    if down is None or right is None:
        pin_all(record, call, call.name)
        return
    record.set(call.out, [*labels[:-3], product([labels[-3], down[1], right[1]]), down[0], right[0]])


@rule("channel_shuffle")
def _channel_shuffle(record: Record, call: Call) -> None:
    labels = record.labels(call["self"])
    split = split_product([labels[1]], [call["groups"], labels[1].size // call["groups"]])
    if split is None:
        pin_all(record, call, call.name)
        return
    labels[1] = product(split[::-1])
    record.set(call.out, labels)
