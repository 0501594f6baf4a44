"""What happens inside a merge, layer by layer: variances, dead inputs, vanishing features, running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import (
    Forward,
    batches_of,
    check_module,
    collated,
    default_forward,
    evaluating,
)
from fastmatch._internal.checks import check_named
from fastmatch._internal.coefficients import check_weights
from fastmatch._internal.layer_calls import on_call
from fastmatch._internal.padding import is_rows
from fastmatch._internal.shared_data import read_in_step
from fastmatch.evaluation.table import Table
from fastmatch.renorm.layers import channel_dim, survey
from fastmatch.renorm.norms import batch_norms, is_norm
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["feature_bound", "layer_table", "running_statistics"]

SLOPE = 0.4
"""Of the published bound: its smoothing factor less one."""


class _LayerMeter:
    """Measures one layer or norm of one model: output statistics, |z|, |z(x) - z(0)|, and inputs that are always zero."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        self.moments = ChannelMoments()
        self.at_zero: torch.Tensor | None = None
        self.kind = kind
        self.weight, self.bias = (_mean_absolute(getattr(layer, name, None)) for name in ("weight", "bias"))
        self._absolute = self._vanishing = self._of_weight = self._norms = 0.0
        self._numbers = self._samples = 0
        self._alive: torch.Tensor | None = None

    def see(self, layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Take one call of the layer. The first must be on zero inputs, all others on data."""
        if self.at_zero is None:
            self.at_zero = output.detach()[:1].double()
            return
        dim = _channels(layer, output) if self.kind == "norm" else channel_dim(layer, output)
        self.moments.update(output, dim)
        self._absolute += float(output.abs().sum(dtype=torch.float64))
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor):
            output_of_weight = output - bias.to(output).view(-1, *[1] * (output.ndim - 1 - dim % output.ndim))
            self._of_weight += float(output_of_weight.abs().sum(dtype=torch.float64))
        else:
            self._of_weight += float(output.abs().sum(dtype=torch.float64))
        change = output.double() - self.at_zero
        self._vanishing += float(change.abs().sum())
        self._norms += float(change.flatten(1).square().mean(1).sqrt().sum())
        self._samples += len(change)
        self._numbers += output.numel()
        along = dim if self.kind == "norm" else channel_dim(layer, inputs)
        alive = (inputs != 0).movedim(along, -1).flatten(0, -2).any(0)
        self._alive = alive if self._alive is None else self._alive | alive

    def row(self) -> dict[str, float]:
        """Return the layer's numbers, over all samples, positions and channels."""
        assert self._alive is not None
        assert self.at_zero is not None
        return {
            "variance": float(self.moments.variance.mean()),
            "mean |z|": self._absolute / self._numbers,
            "mean |z - b|": self._of_weight / self._numbers,
            "mean |W|": self.weight,
            "mean |b|": self.bias,
            "|z(x) - z(0)|": self._vanishing / self._numbers,
            "rms z(x) - z(0)": self._norms / self._samples,
            "mean |z(0)|": float(self.at_zero.abs().mean()),
            "dead inputs": 1 - float(self._alive.double().mean()),
        }


def _mean_absolute(values: object) -> float:
    return float(values.detach().double().abs().mean()) if isinstance(values, torch.Tensor) else 0.0


def _channels(norm: nn.Module, output: torch.Tensor) -> int:
    """Return the dimension of a norm's channels: the last one of layer norms, else the second."""
    is_last = isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or output.ndim < 3
    own = getattr(norm, "weight", None)
    if not is_last and isinstance(own, torch.Tensor) and len(own) != output.shape[1]:
        is_last = True  # a norm of another class
    return output.ndim - 1 if is_last else 1


# parameters: what is measured, on what, and how; each is used alone
def layer_table(
    models: Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    endpoints: Sequence[str] = (),
    norms: bool = False,
    samples: int | None = None,
    weights: Sequence[float] | None = None,
    forward: Forward = default_forward,
    progress: bool | None = None,
) -> Table:
    """Measure the activations of every linear and convolution layer of several models.

    Example:
        >>> models = {"a": model_a, "b": model_b, "merged": fm.merge([model_a, model_b])}
        >>> table = fm.layer_table(models, loader, endpoints=["a", "b"])
        >>> ratios = table.where(model="merged").column("variance ratio")

    Args:
        models: name -> module, of one architecture; they are not changed.
        data: a loader of inputs or (inputs, targets); inputs are tensors. Read once for all models.
        endpoints: names of the models that ratios are taken to.
        norms: measure the outputs of norms too.
        samples: stop after this many samples; None reads all of them.
        weights: one per endpoint; None takes equal ones.
        forward: ``forward(model, batch)`` runs a model on a batch.
        progress: show a progress bar; None shows it on a terminal.

    Returns:
        A :class:`fastmatch.Table` with a row per model and layer and the columns ``model``, ``layer``, ``depth`` (order
        of the first call), ``kind`` (``"layer"`` or ``"norm"``), ``variance`` (of each channel, averaged), ``mean |z|``,
        ``mean |z - b|`` (what the weight gives, without the bias), ``mean |W|``, ``mean |b|``, ``|z(x) - z(0)|`` (the vanishing
        feature measure: how much the input still changes the output), ``rms z(x) - z(0)`` (the same as the paper takes it: the root
        mean square over a sample's numbers, averaged over samples), ``mean |z(0)|`` (what does not depend on the input), and
        ``dead inputs`` (fraction of input channels that are zero on every sample). With ``endpoints`` also ``variance ratio`` and
        ``feature ratio``: variance and vanishing feature measure, divided by the endpoints' average; and ``rms ratio`` with its
        ``feature bound``: the paper's sequence that bounds the ratio and falls with depth (see :func:`feature_bound`). Layers
        and norms have a sequence each.

    Raises:
        TypeError: ``models`` is not a mapping, or a model is not a torch module.
        ValueError: no model, an endpoint that is not among them, weights that do not fit the endpoints, or no data.
    """
    check_named("models", models)
    if not models:
        raise ValueError("models: expected at least one")
    unknown = [name for name in endpoints if name not in models]
    if unknown:
        raise ValueError(f"endpoints: {unknown[0]!r} is not among the models {list(models)}")
    if weights is not None and not endpoints:
        raise ValueError("weights: given without endpoints; they are the weights of the endpoints")
    alphas = check_weights(weights, len(endpoints)) if endpoints else []
    meters: dict[str, dict[str, _LayerMeter]] = {}
    handles = []
    try:
        for key, model in models.items():
            check_module(model, f"models[{key!r}]")
            meters[key] = {}
            for name, layer in survey(model)[0].items():
                handles.append(on_call(layer, _meet(name, "layer", layer, meters[key])))
            for name, norm in ((n, m) for n, m in model.named_modules() if norms and is_norm(m)):
                handles.append(on_call(norm, _meet(name, "norm", norm, meters[key])))
        with evaluating(*models.values()):
            started = False
            every = batches_of(data, "layers", samples=samples, progress=progress)
            for batch in read_in_step(every, *models.values()):
                for model in models.values():
                    if not started:
                        forward(model, _zeros(batch))
                    forward(model, batch)
                started = True
    finally:
        for handle in handles:
            handle.remove()
    rows = [
        {"model": key, "layer": name, "depth": depth, "kind": meter.kind, **meter.row()}
        for key, table in meters.items()
        for depth, (name, meter) in enumerate(table.items(), start=1)
    ]
    if endpoints:
        _add_ratios(rows, endpoints, alphas)
    return Table(tuple(rows))


def _meet(
    name: str, kind: str, layer: nn.Module, table: dict[str, _LayerMeter]
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def see(inputs: torch.Tensor, output: torch.Tensor) -> None:
        if name not in table:
            table[name] = _LayerMeter(layer, kind)
        table[name].see(layer, inputs, output)

    return see


def _zeros(value: Any) -> Any:
    """Return a batch of one sample of zeros, shaped like those of ``value``, including targets and tokens."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value[:1]) if value.ndim else value
    value = collated(value)
    if isinstance(value, Mapping):
        lists = {k: torch.as_tensor(v[0], device="cpu")[None] for k, v in value.items() if is_rows(v)}
        return {k: _zeros(v) for k, v in {**value, **lists}.items()}
    if isinstance(value, (tuple, list)):
        return [_zeros(v) for v in value]
    return value


def _add_ratios(rows: list[dict[str, Any]], endpoints: Sequence[str], weights: list[float]) -> None:
    for ratio, column in (
        ("variance ratio", "variance"),
        ("feature ratio", "|z(x) - z(0)|"),
        ("rms ratio", "rms z(x) - z(0)"),
    ):
        averages: dict[str, float] = {}
        for row in rows:
            if row["model"] in endpoints:
                weight = weights[list(endpoints).index(row["model"])]
                averages[row["layer"]] = averages.get(row["layer"], 0.0) + weight * row[column]
        for row in rows:
            average = averages[row["layer"]]
            row[ratio] = row[column] / average if average else float("nan")

    for key in dict.fromkeys((row["model"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["model"], row["kind"]) == key]
        for row, bound in zip(own, feature_bound([row["rms ratio"] for row in own]), strict=True):
            row["feature bound"] = bound


def feature_bound(ratios: Sequence[float]) -> list[float]:
    """Return the paper's bound on vanishing features: the sequence that lies on or above ``ratios`` and falls with depth.

    ``e_L = r_L`` and ``e_l = max(r_l, e_(l+1) (1 + 0.4 / (L - l + 2)))`` for layers 1 to L, as in the published code. Features
    vanish if the bound comes near zero.

    Example:
        >>> from fastmatch.evaluation.layers import feature_bound
        >>> [round(e, 2) for e in feature_bound([0.9, 0.5, 0.6, 0.1])]
        [0.9, 0.66, 0.6, 0.1]

    Args:
        ratios: of the layers, in the order in which they run. NaN, where a layer has no ratio, counts as 0.
    """
    bound = [0.0 if r != r else r for r in ratios]
    for k in range(len(bound) - 2, -1, -1):
        bound[k] = max(bound[k], bound[k + 1] * (1 + SLOPE / (len(bound) - k + 1)))
    return bound


def running_statistics(models: Mapping[str, nn.Module], *, by_channel: bool = False) -> Table:
    """Return the running statistics of batch norms, for example before and after a reset.

    Example:
        >>> merged = fm.merge([model_a, model_b])
        >>> reset = fm.renormalize(merged, None, loader, "reset")
        >>> table = fm.running_statistics({"before": merged, "after": reset})

    Args:
        models: name -> module.
        by_channel: give every channel a row.

    Returns:
        A :class:`fastmatch.Table` with a row per model and norm and the columns ``model``, ``norm``, ``depth``,
        ``mean |running mean|`` and ``mean running variance``; or with a row per channel and ``channel``,
        ``running mean`` and ``running variance`` instead of the last two.

    Raises:
        TypeError: ``models`` is not a mapping, or a model is not a torch module.
        ValueError: no model has batch norm with running statistics.
    """
    check_named("models", models)
    rows = []
    for key, model in models.items():
        check_module(model, f"models[{key!r}]")
        for depth, (name, norm) in enumerate(batch_norms(model).items(), start=1):
            mean, variance = (norm.state_dict()[f"running_{what}"].double() for what in ("mean", "var"))
            place = {"model": key, "norm": name, "depth": depth}
            if by_channel:
                for channel, (m, v) in enumerate(zip(mean.tolist(), variance.tolist(), strict=True)):
                    rows.append({**place, "channel": channel, "running mean": m, "running variance": v})
                continue
            rows.append(
                {
                    **place,
                    "mean |running mean|": float(mean.abs().mean()),
                    "mean running variance": float(variance.mean()),
                }
            )
    if not rows:
        raise ValueError("models: none of them has batch norm with running statistics")
    return Table(tuple(rows))
