"""One of several ranks speaks: the first."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from fastmatch._internal.ranks import Ranks

__all__ = ["speaking"]


@contextmanager
def speaking(ranks: Ranks) -> Iterator[None]:
    """Silence the output, warnings and log of all ranks but the first. Errors are still printed."""
    if ranks.rank == 0:
        yield
        return
    before = logging.root.manager.disable
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
