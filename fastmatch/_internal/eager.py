"""Compiled models, run as they were written: hooks and modes see no layer and no operation inside compiled code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["eagerly", "uncompiled"]


@contextmanager
def eagerly() -> Iterator[None]:
    """Run what ``torch.compile`` has wrapped, modules and functions, without compiling it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading the compiler takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        yield


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)
