"""A worker of the fuzz that fails in every way, to test what watches it."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection


def work(seed: int, first: int, last: int, largest: int | None, pipe: Connection) -> None:
    """Problem 1 is answered wrongly, 2 crashes, 4 never ends; the others are well."""
    for number in range(first, last):
        pipe.send(("problem", number))
        pipe.send(("time", 0.0))
        if number == 1:
            pipe.send(("finding", (number, "wrong", "detail", "description")))
        elif number == 2:
            os._exit(5)
        while number == 4:
            pass
    pipe.send(("end", last))
