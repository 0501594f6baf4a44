"""The command ``fastmatch partial``: checkpoints in, an exported program out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.files import check_format, check_target, writing
from fastmatch.cli.renormalize import load_into
from fastmatch.merging.ensemble import model_cost
from fastmatch.merging.partial import merge_partial
from fastmatch.merging.unit_rules import CCA, Identity, Permute, Zip
from fastmatch.renorm import renormalize
from fastmatch.spec.running import arguments_of

__all__ = ["export_to", "merge_files"]


def merge_files(
    model: nn.Module,
    example_inputs: Any,
    paths: Sequence[str],
    data: Iterable[Any] | None,
    out: str,
    *,
    rule: str,
    start_at: str | int,
    apart: Sequence[str],
    weights: Sequence[float] | None,
    method: str | None,
    force: bool,
) -> str:
    """Merges the checkpoints in part, renormalizes by ``method`` if one is given, writes ``out``; says the cost."""
    check_format(out, "--out", {".pt2"})
    check_target(out, force=force)
    if method is not None and data is None:
        raise ValueError(f"--data: needed to renormalize by {method!r}")
    models = [load_into(model, path) for path in paths]
    matched = {"permute": Permute, "zip": Zip, "cca": CCA}
    units = Identity() if rule == "identity" else matched[rule](data)  # pyright: ignore[reportArgumentType]
    found = merge_partial(models, example_inputs, units, start_at=start_at, apart=apart, weights=weights)
    merged: nn.Module = found.model
    if method is not None and data is not None:
        goals = None if method == "reset" else found.endpoint_statistics(models, data)
        merged = renormalize(merged, goals, data, method)  # pyright: ignore[reportArgumentType]
    export_to(merged, example_inputs, out, force=force)
    single, cost = model_cost(models[0], example_inputs), model_cost(merged, example_inputs)
    flops = f", {cost.flops / single.flops:.2f} times the FLOPs" if single.flops else ""
    return (
        f"{len(found.maps)} of {len(found.spec.groups)} groups merged by {rule}; {cost.parameters} parameters, "
        f"{cost.parameters / single.parameters:.2f} times one model's{flops}; wrote {out}"
    )


def export_to(model: nn.Module, example_inputs: Any, out: str, *, force: bool = False) -> None:
    """Writes ``model`` as ``torch.export`` has it, for any batch size that its operations allow."""
    args, kwargs = arguments_of(example_inputs, None)

    def dynamic(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.ndim else None

    shapes = (*map(dynamic, args), *map(dynamic, kwargs.values()))
    program = torch.export.export(model.eval(), args, kwargs or None, dynamic_shapes=shapes)
    with writing(out, force=force) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
