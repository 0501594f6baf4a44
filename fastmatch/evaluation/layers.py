"""What happens inside a merge: variances, dead units, vanishing features, running statistics, distances.

Every function returns a :class:`fastmatch.Table` of plain records: no analysis needs pandas, and
``table.to_pandas()`` makes a data frame of it where pandas is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, batches_of, check_module, default_forward, evaluating
from fastmatch._internal.coefficients import check_weights
from fastmatch.evaluation.table import Table
from fastmatch.renorm.layers import channel_dim, survey
from fastmatch.renorm.plan import batch_norms
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["layer_table", "running_statistics"]


class _LayerMeter:
    """Of one layer in one model: output statistics, |z|, |z(x) - z(0)|, inputs that are never other than zero."""

    def __init__(self) -> None:
        self.moments = ChannelMoments()
        self.at_zero: torch.Tensor | None = None
        self._absolute = self._vanishing = 0.0
        self._numbers = 0
        self._alive: torch.Tensor | None = None

    def see(self, layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """One call on data; on zero input if none was seen yet."""
        if self.at_zero is None:
            self.at_zero = output.detach()[:1].double()
            return
        self.moments.update(output, channel_dim(layer, output))
        self._absolute += float(output.abs().sum(dtype=torch.float64))
        self._vanishing += float((output.double() - self.at_zero).abs().sum())
        self._numbers += output.numel()
        alive = (inputs != 0).movedim(channel_dim(layer, inputs), -1).flatten(0, -2).any(0)
        self._alive = alive if self._alive is None else self._alive | alive

    def row(self) -> dict[str, float]:
        """The numbers of the layer, over all samples, positions and channels."""
        assert self._alive is not None
        return {
            "variance": float(self.moments.variance.mean()),
            "mean |z|": self._absolute / self._numbers,
            "|z(x) - z(0)|": self._vanishing / self._numbers,
            "dead inputs": 1 - float(self._alive.double().mean()),
        }


def layer_table(
    models: Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    endpoints: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    samples: int | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Table:
    """Per model and layer what its activations do on ``data``; all models in one read.

    Columns: ``model``, ``layer``, ``depth`` (order of first call), ``variance`` (per channel, averaged),
    ``mean |z|``, ``|z(x) - z(0)|`` (the vanishing-feature measure: how much the input still moves the output),
    ``dead inputs`` (share of input channels that are zero on every sample) and, with ``endpoints``,
    ``variance ratio`` and ``feature ratio``: variance and vanishing-feature measure over the endpoints' average.

    Example:
        >>> table = fm.layer_table({"a": a, "b": b, "merged": merged}, loader, endpoints=["a", "b"])
        >>> table.where(model="merged").column("variance ratio")

    Args:
        models: by name; of one architecture. Left as they are.
        data: a loader of inputs or (inputs, targets); inputs are tensors.
        endpoints: names of the models that ratios are taken to.
        weights: of the endpoints; equal ones where left out.
        samples: stop after so many.
        forward: how to run a model on a batch.
        progress: show a bar; None shows it on a terminal.
    """
    unknown = [name for name in endpoints if name not in models]
    if unknown:
        raise ValueError(f"endpoints: {unknown[0]!r} is none of the models {list(models)}")
    meters: dict[str, dict[str, _LayerMeter]] = {}
    handles = []
    try:
        for key, model in models.items():
            check_module(model, f"models[{key!r}]")
            meters[key] = {}
            for name, layer in survey(model)[0].items():
                handles.append(layer.register_forward_hook(_hook(name, meters[key])))
        with evaluating(*models.values()):
            started = False
            for batch in batches_of(data, "layers", samples=samples, progress=progress):
                for model in models.values():
                    if not started:
                        forward(model, _zeros(batch))
                    forward(model, batch)
                started = True
    finally:
        for handle in handles:
            handle.remove()
    rows = [
        {"model": key, "layer": name, "depth": depth, **meter.row()}
        for key, table in meters.items()
        for depth, (name, meter) in enumerate(table.items(), start=1)
    ]
    if endpoints:
        _add_ratios(rows, endpoints, check_weights(weights, len(endpoints)))
    return Table(tuple(rows))


def _hook(name: str, table: dict[str, _LayerMeter]) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        table.setdefault(name, _LayerMeter()).see(layer, inputs[0], output)

    return hook


def _zeros(value: Any) -> Any:
    """A batch of one sample of zeros, shaped like ``value``'s; whole numbers (targets, tokens) are zero too."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value[:1]) if value.ndim else value
    if isinstance(value, Mapping):
        return {k: _zeros(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_zeros(v) for v in value]
    return value


def _add_ratios(rows: list[dict[str, Any]], endpoints: Sequence[str], weights: list[float]) -> None:
    for ratio, column in (("variance ratio", "variance"), ("feature ratio", "|z(x) - z(0)|")):
        goals: dict[str, float] = {}
        for row in rows:
            if row["model"] in endpoints:
                weight = weights[list(endpoints).index(row["model"])]
                goals[row["layer"]] = goals.get(row["layer"], 0.0) + weight * row[column]
        for row in rows:
            goal = goals[row["layer"]]
            row[ratio] = row[column] / goal if goal else float("nan")


def running_statistics(models: Mapping[str, nn.Module]) -> Table:
    """Batch norm's running statistics, a row a model and norm: before and after a reset, say.

    Columns: ``model``, ``norm``, ``depth``, ``mean |running mean|``, ``mean running variance``.

    Example:
        >>> fm.running_statistics({"before": merged, "after": fm.renormalize(merged, None, loader, "reset")})
    """
    rows = []
    for key, model in models.items():
        check_module(model, f"models[{key!r}]")
        for depth, (name, norm) in enumerate(batch_norms(model).items(), start=1):
            state = norm.state_dict()
            rows.append(
                {
                    "model": key,
                    "norm": name,
                    "depth": depth,
                    "mean |running mean|": float(state["running_mean"].double().abs().mean()),
                    "mean running variance": float(state["running_var"].double().mean()),
                }
            )
    if not rows:
        raise ValueError("models: none has batch norm with running statistics")
    return Table(tuple(rows))
