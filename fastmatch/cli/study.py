"""The ``fastmatch study`` command's ends: the user's datasets in, a summary out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastmatch.studies.paper.claims import Claim

__all__ = ["datasets", "summary", "table"]


def datasets(builder: Callable[[], Any], argument: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """The (train, test) datasets that the user's callable returns."""
    built = builder()
    if (
        not isinstance(built, (tuple, list))
        or len(built) != 2
        or not all(hasattr(d, "__getitem__") for d in built)
    ):
        raise ValueError(
            f"--data: {argument} returned {type(built).__name__}, expected (train, test) torch datasets"
        )
    return built[0], built[1]


def table(record: dict[str, Any]) -> str:
    """The claims as lines of text."""
    claims = [Claim(**entry) for entry in record["claims"]]
    width = max(len(claim.verdict) for claim in claims)
    return "\n".join(f"{c.verdict:<{width}}  {c.true:>2} of {c.cases:<2}  {c.claim}" for c in claims)


def summary(record: dict[str, Any], out: str | Path) -> str:
    """The claims, and where the report is."""
    return f"{table(record)}\n\n{record['seconds']['wall']} s; the report is {Path(out) / 'study.html'}"
