"""Pooling, padding and resizing of spatial axes."""

from __future__ import annotations

from fastmatch.spec.labels import pin
from fastmatch.spec.operations import Call
from fastmatch.spec.record import Record, fresh
from fastmatch.spec.rules.registry import rule

__all__: list[str] = []


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_avg_pool1d", "max_pool1d", "max_pool2d", "max_pool3d", "reflection_pad1d",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "mkldnn_max_pool2d", "quantized_max_pool2d",
)  # fmt: skip
def _spatial(record: Record, call: Call) -> None:
    """Keep the leading axes; pin the spatial ones, whose number is in the operation's name."""
    reason = f"{call.name} (spatial)"
    labels = record.labels(call.first)
    spatial = int(next(c for c in call.base if c in "123"))
    lead = len(labels) - spatial
    for label in labels[lead:]:
        pin(label, reason)
    for tensor in call.outputs:
        record.set(tensor, [*labels[:lead], *fresh(tensor.shape[lead:], reason)])
