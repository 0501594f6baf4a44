"""Lines that say in which tensors of a merge one of the checkpoints has no part."""

from __future__ import annotations

import logging

from fastmatch.checkpoint.inputs import differ_in_inputs
from fastmatch.checkpoint.reader import Checkpoint

__all__ = ["log_differences"]

log = logging.getLogger("fastmatch")


def log_differences(first: Checkpoint, other: Checkpoint, *, sizes: bool = True) -> None:
    """Name what ``other`` lacks of ``first``, whose tensors are written, and has besides; with ``sizes`` what it has in another size too."""
    shapes = {
        name: (tensor.shape, other.headers[name].shape)
        for name, tensor in first.headers.items()
        if name in other
    }
    differ = [name for name, (mine, its) in shapes.items() if sizes and mine != its]
    wider = [name for name in differ if differ_in_inputs(name, *shapes[name])]
    no_part = "it has no part in those"
    for what, found, then in (
        ("has other input channels in", wider, "only the first four are merged, the latent"),
        ("has another size of", [name for name in differ if name not in wider], no_part),
        ("lacks", [name for name in first if name not in other], no_part),
    ):
        if found:
            log.warning(
                "%s: %s %d of the %d tensors of %s, such as %s; %s", other.path, what, len(found), len(first), first.path,
                ", ".join(found[:3]), then,
            )  # fmt: skip
    extra = [name for name in other if name not in first]
    if extra:
        log.warning(
            "%s: %d tensors that %s lacks are left out, such as %s", other.path, len(extra), first.path, ", ".join(extra[:3])
        )  # fmt: skip
