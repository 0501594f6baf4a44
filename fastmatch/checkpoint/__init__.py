"""Align and verify checkpoints out of core: tensors are read one by one, and outputs are written completely or not at all."""

from fastmatch.checkpoint.align import WriteOptions, align_checkpoints
from fastmatch.checkpoint.apply import apply_to_checkpoint
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import trace_config
from fastmatch.checkpoint.verify import CheckpointVerification, verify_checkpoints

__all__ = [
    "Checkpoint",
    "CheckpointVerification",
    "WriteOptions",
    "align_checkpoints",
    "apply_to_checkpoint",
    "trace_config",
    "verify_checkpoints",
]
