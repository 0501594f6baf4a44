"""ot.emd, published by the package POT, for the transport problems that are assignments: uniform, equally long marginals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastmatch.assignment import solve
from fastmatch.backends.patch_target import UNSUPPORTED, PatchTarget, is_small

__all__ = ["TARGETS", "replacement"]


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with POT's contract: the (n, n) transport plan, a permutation matrix times the mass of one point.

    Rows are the points of ``a``, columns the points of ``b``. Array type, dtype and device follow ``a``; if ``a`` is
    empty, ``b``; if both are empty, ``M``. The original keeps problems with fewer than 200 points, marginals that are
    not uniform, rectangles, ``log=True``, array types other than numpy and torch, dtypes that are not floating point,
    and every input that our solver does not support.
    """

    @functools.wraps(original)
    def emd(a: Any, b: Any, M: Any, *args: Any, **options: Any) -> Any:
        log = options.get("log", args[1] if len(args) > 1 else False)
        if not log:
            plan = _plan(a, b, M)
            if plan is not None:
                return plan
        return original(a, b, M, *args, **options)

    return emd


def _plan(a: Any, b: Any, M: Any) -> Any:
    """Return the plan, or None if the original has to solve the problem."""
    given = [x for x in (a, b) if len(x)]
    like = given[0] if given else M
    if not any(all(isinstance(x, kind) for x in (*given, M)) for kind in (np.ndarray, torch.Tensor)):
        return None
    if not (like.is_floating_point() if isinstance(like, torch.Tensor) else like.dtype.kind == "f"):
        return None
    if isinstance(M, torch.Tensor) and M.layout != torch.strided:
        return None
    cost = M.detach().cpu().numpy() if isinstance(M, torch.Tensor) else M
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or is_small(cost):
        return None
    n = len(cost)
    mass = _mass(given, n)
    if mass is None:
        return None
    try:
        found = solve(cost)
    except UNSUPPORTED:
        return None
    if isinstance(like, torch.Tensor):
        plan = torch.zeros(n, n, dtype=like.dtype, device=like.device)
    else:
        plan = np.zeros((n, n), like.dtype)
    plan[found.row_ind, found.col_ind] = mass
    return plan


def _mass(marginals: list[Any], n: int) -> float | None:
    """Return the mass of each point, or None if the masses differ. An empty marginal is uniform with total mass one."""
    mass = 1.0 / n if len(marginals) < 2 else float(marginals[0][0])
    if all(x.shape == (n,) and bool((x == mass).all()) for x in marginals) and mass > 0:
        return mass
    return None


TARGETS = (PatchTarget("ot", "ot", "emd", replacement),)
