"""Align, merge and verify checkpoints out of core: tensors are read one by one, and outputs are written completely or not at all."""

from fastmatch.checkpoint.align import WriteOptions, align_checkpoints
from fastmatch.checkpoint.apply import apply_to_checkpoint
from fastmatch.checkpoint.blocks import unet_blocks
from fastmatch.checkpoint.many import align_many_checkpoints
from fastmatch.checkpoint.merge import MergeOptions, merge_checkpoints
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import trace_config
from fastmatch.checkpoint.verify import CheckpointVerification, verify_checkpoints

__all__ = [
    "Checkpoint",
    "CheckpointVerification",
    "MergeOptions",
    "WriteOptions",
    "align_checkpoints",
    "align_many_checkpoints",
    "apply_to_checkpoint",
    "merge_checkpoints",
    "trace_config",
    "unet_blocks",
    "verify_checkpoints",
]
