"""The versions that a run depends on."""

from __future__ import annotations

import platform

import torch

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("fastmatch")
    except PackageNotFoundError:
        own = "a checkout"
    return {"fastmatch": own, "torch": torch.__version__, "Python": platform.python_version()}
