"""Layers that sentence-transformers runs on a model's output: carried where the output keeps its order."""

from __future__ import annotations

import logging
from typing import Any

from fastmatch.checkpoint.diffusion.added import check_added
from fastmatch.checkpoint.reader import CONFIG, Checkpoint
from fastmatch.checkpoint.structure import build_empty, trace_config
from fastmatch.spec import PermutationSpec

__all__ = ["leave_what_does_not_fit"]

log = logging.getLogger("fastmatch")


def leave_what_does_not_fit(checkpoint: Checkpoint, spec: PermutationSpec) -> None:
    """Take the layers in sub-folders out of a checkpoint if the spec may move what they read; a warning names them.

    Raises:
        ValueError: a pipeline holds a network that is added to what the spec may move; see :func:`check_added`.
    """
    check_added(checkpoint, spec)
    if checkpoint.modules and not _keeps_output(checkpoint, spec):
        log.warning(
            "%s: not carried, because the order of what they read may change: %s", checkpoint.path,
            ", ".join(sorted(checkpoint.modules)),
        )  # fmt: skip
        checkpoint.leave_modules()


def _keeps_output(checkpoint: Checkpoint, spec: PermutationSpec) -> bool:
    """Whether every group is one that the model of the config has without a head: then its hidden states keep their order.

    A spec of a model with a head keeps the logits only.
    """
    if not (checkpoint.path / CONFIG).is_file():
        return False
    model: Any = build_empty(checkpoint.path)
    if getattr(model, "base_model", None) is not model:
        return False
    traced = trace_config(checkpoint.path).groups
    return all(
        name in traced and set(group.axes) <= set(traced[name].axes) for name, group in spec.groups.items()
    )
