"""What happens inside a merge, layer by layer: variances, dead inputs, vanishing features, running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
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
from fastmatch.renorm.endpoints import CallCounter
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
        self.kind = kind
        self._at_zero: list[torch.Tensor] = []
        self.weight, self.bias = (_mean_absolute(getattr(layer, name, None)) for name in ("weight", "bias"))
        self._absolute = self._vanishing = self._of_weight = self._norms = self._constant = 0.0
        self._numbers = self._samples = 0
        self._alive: torch.Tensor | None = None

    def see_zero(self, output: torch.Tensor, call: int) -> None:
        """Take the output of one call on a batch of zeros; ``call`` counts the calls of a forward pass."""
        kept = output.detach()
        if len(kept) and bool((kept == kept[:1]).all()):  # every sample is the same
            kept = kept[:1]
        self._at_zero[call:] = [kept.double()]

    def see(self, layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor, call: int) -> None:
        """Take one call on data, after the same call on zeros.

        Raises:
            ValueError: the call was not made on zeros, or its output there has another shape.
        """
        at_zero = self._at_zero[call] if call < len(self._at_zero) else None
        if at_zero is None or at_zero.shape[1:] != output.shape[1:] or len(at_zero) not in (1, len(output)):
            there = "is not made" if at_zero is None else f"has an output of shape {tuple(at_zero.shape)}"
            raise ValueError(
                f"models: expected calls of one shape on data and on zeros; call {call} of a {type(layer).__name__} {there} on zeros, "
                f"and has an output of shape {tuple(output.shape)} on data"
            )
        dim = _channels(layer, output) if self.kind == "norm" else channel_dim(layer, output)
        self.moments.update(output, dim)
        self._absolute += float(output.abs().sum(dtype=torch.float64))
        bias = getattr(layer, "bias", None)
        if isinstance(bias, torch.Tensor):
            output_of_weight = output - bias.to(output).view(-1, *[1] * (output.ndim - 1 - dim % output.ndim))
            self._of_weight += float(output_of_weight.abs().sum(dtype=torch.float64))
        else:
            self._of_weight += float(output.abs().sum(dtype=torch.float64))
        change = output.double() - at_zero
        self._constant += float(at_zero.abs().mean()) * output.numel()
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
        return {
            "variance": float(self.moments.variance.mean()),
            "mean |z|": self._absolute / self._numbers,
            "mean |z - b|": self._of_weight / self._numbers,
            "mean |W|": self.weight,
            "mean |b|": self.bias,
            "|z(x) - z(0)|": self._vanishing / self._numbers,
            "rms z(x) - z(0)": self._norms / self._samples,
            "mean |z(0)|": self._constant / self._numbers,
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
        data: a loader of inputs or (inputs, targets); inputs are tensors. Read once for all models, which run once more on zeros
            for every new shape of a batch.
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
        ValueError: no model, an endpoint that is not among them, weights that do not fit the endpoints, no data, or a layer
            whose calls depend on the values of the inputs, so that z(0) is not known for each.
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
    for key, model in models.items():
        check_module(model, f"models[{key!r}]")
    passes = {id(model): _Pass() for model in models.values()}  # a model under two names is run once
    distinct = {id(model): model for model in models.values()}
    handles = []
    try:
        for key, model in distinct.items():
            for name, layer in survey(model)[0].items():
                handles.append(on_call(layer, _meet(name, "layer", layer, passes[key])))
            for name, norm in ((n, m) for n, m in model.named_modules() if norms and is_norm(m)):
                handles.append(on_call(norm, _meet(name, "norm", norm, passes[key])))
        with evaluating(*distinct.values()):
            shapes = None
            every = batches_of(data, "layers", samples=samples, progress=progress)
            for batch in read_in_step(every, *distinct.values()):
                last, shapes = shapes, _shapes(batch)
                for key, model in distinct.items():
                    if shapes != last:
                        with passes[key].running(on_zeros=True):
                            forward(model, _zeros(batch))
                    with passes[key].running(on_zeros=False):
                        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    rows = [
        {"model": key, "layer": name, "depth": depth, "kind": meter.kind, **meter.row()}
        for key, model in models.items()
        for depth, (name, meter) in enumerate(passes[id(model)].meters.items(), start=1)
    ]
    if endpoints:
        _add_ratios(rows, endpoints, alphas)
    return Table(tuple(rows))


class _Pass:
    """The meters of one model, and whether it is running, on zeros or on data."""

    def __init__(self) -> None:
        self.meters: dict[str, _LayerMeter] = {}
        self.counter = CallCounter()
        self.is_running = self.on_zeros = False

    @contextmanager
    def running(self, *, on_zeros: bool) -> Iterator[None]:
        """Measure one forward pass. Layers that another model shares are not measured when that one runs."""
        self.counter.start()
        self.is_running, self.on_zeros = True, on_zeros
        try:
            yield
        finally:
            self.is_running = False


def _meet(name: str, kind: str, layer: nn.Module, own: _Pass) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def see(inputs: torch.Tensor, output: torch.Tensor) -> None:
        if not own.is_running:
            return
        call = own.counter.next(name)
        meter = own.meters.setdefault(name, _LayerMeter(layer, kind))
        if own.on_zeros:
            meter.see_zero(output, call)
        else:
            meter.see(layer, inputs, output, call)

    return see


def _shapes(value: Any) -> Any:
    """Return the shapes of the tensors and rows in a batch; the outputs on zeros are kept for batches of the same shapes."""
    if isinstance(value, Mapping):
        return {k: _shapes(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shapes(v) for v in value]
    return getattr(value, "shape", ())


def _zeros(value: Any) -> Any:
    """Return a batch of zeros, shaped like ``value``, including targets and tokens."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value) if value.ndim else value
    value = collated(value)
    if isinstance(value, Mapping):
        return {k: _zeros_of_rows(v) if is_rows(v) else _zeros(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_zeros(v) for v in value]
    return value


def _zeros_of_rows(value: Any) -> Any:
    if isinstance(value, (torch.Tensor, np.ndarray)) or not hasattr(value[0], "__len__"):
        return torch.zeros_like(torch.as_tensor(value))
    return [torch.zeros_like(torch.as_tensor(row, device="cpu")) for row in value]


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
