"""Huge pages for torch's large tensors on Linux.

The system hands out memory in pages of 4 KiB, and clears each one when it is first touched. For tensors that are made, read
once and let go, as those of a checkpoint are, this takes most of the time.
"""

from __future__ import annotations

import os

__all__ = ["ask_for_huge_pages"]

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""What torch looks at when it first allocates a tensor."""


def ask_for_huge_pages() -> None:
    """Let torch ask for huge pages in this process and those that it starts, unless the user has decided.

    It has no effect once torch has allocated a tensor, and none where the system does not offer huge pages.
    """
    os.environ.setdefault(VARIABLE, "1")
