"""The commands ``fastmatch renormalize`` and ``fastmatch curve``: checkpoints in, a checkpoint or a curve out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from fastmatch._internal.files import (
    TORCH_SUFFIXES,
    check_format,
    check_target,
    load_state,
    save_state,
)
from fastmatch._internal.modules import copy_module
from fastmatch._internal.states import check_finite, check_same_architecture, state_of
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import interpolate
from fastmatch.renorm import Renormalization, plan_renormalization, renormalize

__all__ = ["curve_files", "load_into", "loader_of", "renormalize_file"]


def loader_of(builder: Callable[[], Any], option: str) -> Iterable[Any]:
    """The loader that the user's callable returns."""
    data = builder()
    if not isinstance(data, Iterable) or iter(data) is data:
        raise ValueError(
            f"{option}: expected a callable that returns a loader or a list of batches, got {data!r}"
        )
    return data


def load_into(model: nn.Module, path: str) -> nn.Module:
    """A copy of ``model`` in eval mode that holds the checkpoint at ``path``."""
    state = load_state(path)
    check_same_architecture(state_of(model, "--model"), state, "--model", path)
    check_finite(state, path)
    new = copy_module(model)
    new.load_state_dict(state)
    return new.eval()


def renormalize_file(
    model: nn.Module,
    path: str,
    endpoints: Sequence[str],
    data: Iterable[Any],
    out: str,
    *,
    method: str,
    weights: Sequence[float] | None,
    mode: str,
    samples: int | None,
    force: bool,
) -> str:
    """Renormalizes the checkpoint at ``path`` and writes it to ``out``; says what was done."""
    check_format(out, "--out", TORCH_SUFFIXES | {".safetensors"})
    check_target(out, force=force)
    merged = load_into(model, path)
    ends = [load_into(model, end) for end in endpoints]
    options = Renormalization(method, mode, samples)  # pyright: ignore[reportArgumentType]
    plan = plan_renormalization(merged, options)
    if plan.method != "reset" and not ends:
        raise ValueError(f"--endpoints: needed for method {plan.method!r}")
    new = renormalize(merged, ends or None, data, options, weights=weights)
    save_state(new.state_dict(), out, force=force)
    return f"{plan}\nwrote {out}"


def curve_files(
    model: nn.Module,
    a: str,
    b: str,
    data: Iterable[Any],
    out: str,
    *,
    points: int,
    method: str | None,
    calibration: Iterable[Any] | None,
    mode: str,
    samples: int | None,
    plot: str | None,
    force: bool,
) -> str:
    """Evaluates the line between two checkpoints, writes it as CSV (and a picture); says the barriers."""
    check_format(out, "--out", {".csv"})
    if plot is not None:
        check_format(plot, "--plot", {".png", ".svg", ".pdf"})
    for target in [out, *([plot] if plot else [])]:
        check_target(target, force=force)
    between = None
    if method is not None:
        if calibration is None:
            raise ValueError("--calibration: needed to renormalize a curve")
        options = Renormalization(method, mode, samples)  # pyright: ignore[reportArgumentType]
        between = Renormalized(calibration, options)
    curve = interpolate(load_into(model, a), load_into(model, b), data, points, between=between)
    curve.table().to_csv(out, force=force)
    if plot is not None:
        curve.plot(plot)
    return (
        f"{curve.table()}\nloss barrier {curve.barrier:.4f}, accuracy barrier {curve.accuracy_barrier:.4f}; "
        f"wrote {out}"
    )
