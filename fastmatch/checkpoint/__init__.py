"""Checkpoints larger than memory: read tensor by tensor, aligned, verified and written whole or not at all."""

from fastmatch.checkpoint.align import align_checkpoints
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import trace_config
from fastmatch.checkpoint.verify import CheckpointVerification, verify_checkpoints

__all__ = ["Checkpoint", "CheckpointVerification", "align_checkpoints", "trace_config", "verify_checkpoints"]
