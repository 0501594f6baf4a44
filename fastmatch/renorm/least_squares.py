"""Least squares, layer by layer: weights whose outputs are nearest to the weighted mean of the endpoints' outputs.

For inputs X and target outputs Z of a layer, (rows, features) and (rows, C), both less their means, and its weight W0 in
the merge::

    W = argmin ||X W^T - Z||^2 / rows + lambda ||W - W0||^2,   b = mean(Z) - W mean(X)
      = W0 + (Cov(Z, X) - W0 Cov(X, X)) (Cov(X, X) + lambda I)^-1

lambda is ``ridge`` times the mean variance of the inputs. What inputs cannot explain is lost, so the fit has less variance
than Z, layer after layer. ``restore_variance`` therefore scales each output's weights until its variance is that of Z.

The covariances are summed over the data batch by batch, so rows are never kept. The rows of a convolution are the patches
that its kernel sees. Weights that are zero stay zero: each output then has a system of its own, over the weights that it
has, as in SparseGPT.

Sources: Nasery et al. 2024 (PLeaS); Frantar and Alistarh 2023 (SparseGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmatch._internal.batches import Forward, device_of, evaluating
from fastmatch._internal.layer_calls import on_call, on_input
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.states import working_dtype
from fastmatch.renorm.hooks import reset_hooks
from fastmatch.renorm.layers import Layer, bias_mask, by_outputs, channel_dim, raw_bias, raw_weight
from fastmatch.renorm.lockstep import Lockstep
from fastmatch.renorm.options import Renormalization
from fastmatch_kernels import ops as kernels
from fastmatch_kernels.moments.reference import Moments

__all__ = ["CannotFit", "LayerFit", "fit_jointly", "fit_sequentially", "input_rows"]

ENTRIES = 1 << 24
"""Of patches that are made at once."""
LARGEST_GAIN = 3.0
"""Of an output whose variance is restored. Where the inputs explain less than a ninth, scaling would mostly add what is wrong."""
SYSTEMS = 1 << 25
"""Entries of the systems of pruned outputs that are solved at once."""

Hook = Callable[..., Any]


class CannotFit(ValueError):
    """A layer has no least squares problem with one solution."""


def input_rows(layer: Layer, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what a layer multiplies its weight with, (rows, groups, features), some samples at a time.

    The rows are in the order of the output's samples and positions.

    Args:
        layer: linear or convolution.
        inputs: of one call.
    """
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield inputs.reshape(-1, 1, inputs.shape[-1])
        return
    dims = len(layer.kernel_size)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = inputs if inputs.ndim == dims + 2 else inputs[None]
    sizes = [
        (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, dilation, (before, after) in zip(
            x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, _padding(layer), strict=True
        )
    ]
    features = layer.weight[0].numel() * layer.groups
    step = max(ENTRIES // max(torch.Size(sizes).numel() * features, 1), 1)
    for part in x.split(step):
        padded = F.pad(part, layer._reversed_padding_repeated_twice, mode=mode)
        batch, channel, *along = padded.stride()
        moved = [s * stride for s, stride in zip(along, layer.stride, strict=True)]
        inside = [s * dilation for s, dilation in zip(along, layer.dilation, strict=True)]
        patches = padded.as_strided(
            (len(part), *sizes, x.shape[1], *layer.kernel_size), (batch, *moved, channel, *inside)
        )
        yield patches.reshape(-1, layer.groups, features // layer.groups)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Return (before, after) for each dimension of the positions."""
    flat = layer._reversed_padding_repeated_twice
    return [(flat[k], flat[k + 1]) for k in range(0, len(flat), 2)][::-1]


class LayerFit:
    """The least squares problem of one layer: covariances summed over batches, and their solution.

    Args:
        name: of the layer, for messages.
        layer: the merge's.

    Raises:
        CannotFit: the weight is computed from another tensor by more than a mask.
    """

    def __init__(self, name: str, layer: Layer) -> None:
        self.name, self.layer = name, layer
        raw, weight = raw_weight(layer), layer.weight
        if raw is None or raw.shape != weight.shape or not torch.equal(raw[weight != 0], weight[weight != 0]):
            raise CannotFit(
                f"layers: the weight of {name!r} is computed from another tensor, so least squares cannot set it; name the others"
            )
        self._moments: list[Moments | None] = [None] * int(getattr(layer, "groups", 1))
        self._batches = 0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch.

        Args:
            inputs: that the layer is given.
            targets: the outputs that it shall have.

        Raises:
            ValueError: NaN or infinity among them.
        """
        rows = targets.movedim(channel_dim(self.layer, targets), -1).reshape(
            -1, len(self._moments), self._outputs
        )
        start = 0
        for part in input_rows(self.layer, inputs):
            goals = rows[start : start + len(part)]
            start += len(part)
            for k, known in enumerate(self._moments):
                if len(part):
                    self._moments[k] = kernels.moments(
                        part[:, k].to(goals),
                        goals[:, k],
                        cross=("ab", "aa"),
                        state=known,
                        backend=_backend(part),
                    )
        for found in self._moments:
            if found is not None and not all(bool(torch.isfinite(s).all()) for s in found.settle().stats):
                raise ValueError(
                    f"data: batch {self._batches} (counted from 0) gives NaN or infinite activations at {self.name!r}; "
                    "look for them in the batch, or for overflow in the networks"
                )
        self._batches += 1

    @property
    def has_run(self) -> bool:
        """Whether the layer was given any rows."""
        return any(found is not None for found in self._moments)

    @property
    def has_one_row(self) -> bool:
        """Whether the layer was given a single row, of which no covariance is known."""
        return self.has_run and all(found is None or found.count == 1 for found in self._moments)

    @property
    def _outputs(self) -> int:
        """Output channels of each group."""
        return len(by_outputs(self.layer, self.layer.weight)) // len(self._moments)

    @torch.no_grad()
    def write(self, ridge: float, *, restore_variance: bool) -> None:
        """Solve, and write weight and bias into the layer; a missing bias is created.

        A layer that was given no rows stays as it is.

        Args:
            ridge, restore_variance: see this module.
        """
        if not self.has_run:
            return
        old = by_outputs(self.layer, self.layer.weight.detach())
        parts = old.double().reshape(len(self._moments), self._outputs, -1)
        weights, biases = [], []
        for found, weight in zip(self._moments, parts, strict=True):
            assert found is not None
            weight = weight.to(found.stats[0].device)
            inputs = found.covariance("aa")
            weight = _nearest(inputs, found.covariance("ab").T, weight, ridge)
            if restore_variance:
                weight = weight * _gain(weight, inputs, found.variance(1))[:, None]
            weights.append(weight)
            biases.append(found.mean(1) - weight @ found.mean(0))
        self._store(torch.cat(weights).reshape(old.shape).to(old), torch.cat(biases).to(old))

    @torch.no_grad()
    def saliency(self, ridge: float) -> torch.Tensor:
        """Return how much worse the outputs get without each weight, the others of its output corrected: of its shape.

        This is ``w^2 / (2 [H^-1]_jj)`` with ``H = Cov(X, X) + lambda I`` (optimal brain surgeon, Hassibi and Stork 1993).
        """
        old = by_outputs(self.layer, self.layer.weight.detach())
        parts = old.double().reshape(len(self._moments), self._outputs, -1)
        scores = []
        for found, weight in zip(self._moments, parts, strict=True):
            if found is None:
                raise ValueError(f"layers: {self.name!r} was never run on the data")
            system = found.covariance("aa")
            system.diagonal().add_(max(ridge * float(system.diagonal().mean()), 1e-300))
            own = torch.linalg.inv(system).diagonal()
            scores.append(weight.to(own.device).square() / (2 * own))
        return by_outputs(self.layer, torch.cat(scores).reshape(old.shape).to(old))

    def second_moments(self) -> list[torch.Tensor]:
        """Return the mean of x x^T over the rows of each group's inputs, (features, features) float64 each.

        Raises:
            ValueError: the layer was given no rows.
        """
        if not self.has_run:
            raise ValueError(f"layers: {self.name!r} was never run on the data")
        found = [m for m in self._moments if m is not None]
        return [m.covariance("aa") + torch.outer(m.mean(0), m.mean(0)) for m in found]

    def _store(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        layer: Any = self.layer
        raw, mask = raw_weight(layer), bias_mask(layer)
        assert raw is not None
        rows = by_outputs(layer, raw)
        # Masked entries of a pruned weight keep what is under the mask.
        rows.copy_(torch.where(by_outputs(layer, layer.weight) == 0, rows, weight))
        own = dict(layer.named_parameters(recurse=False))
        known = raw_bias(layer)
        if known is None:
            layer.bias = nn.Parameter(bias, requires_grad=raw.requires_grad)
        else:
            known.copy_(bias if mask is None else torch.where(mask.bool(), bias, known))
        # torch.nn.utils.prune keeps the masked product as a plain attribute until the next forward pass.
        for name in ("weight", "bias"):
            if f"{name}_orig" in own:
                setattr(layer, name, own[f"{name}_orig"].detach() * getattr(layer, f"{name}_mask"))


def _backend(x: torch.Tensor) -> Any:
    """Return the backend of the moments: those of float64 on a GPU are in torch."""
    return "reference" if x.dtype == torch.float64 and x.device.type != "cpu" else None


def _nearest(inputs: torch.Tensor, crossed: torch.Tensor, weight: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the weight that minimizes the objective of this module; zeros of ``weight`` stay.

    Args:
        inputs: (features, features) covariance.
        crossed: (outputs, features) covariance of targets and inputs.
        weight: (outputs, features) of the merge.
        ridge: of the mean variance.
    """
    scale = inputs.diagonal().mean()
    if not scale > 0:  # inputs that never vary tell nothing about the weight
        return weight
    missing = crossed - weight @ inputs
    system = inputs + ridge * scale * torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
    present = weight != 0
    if bool(present.all()):
        return weight + torch.linalg.solve(system, missing.T).T
    steps = []
    at_once = max(SYSTEMS // system.numel(), 1)
    for some, error in zip(present.split(at_once), missing.split(at_once), strict=True):
        own = torch.where(some[:, :, None] & some[:, None, :], system, 0.0)
        own.diagonal(dim1=1, dim2=2).masked_fill_(~some, 1.0)
        steps.append(torch.linalg.solve(own, torch.where(some, error, 0.0)))
    return weight + torch.cat(steps)


def _gain(weight: torch.Tensor, inputs: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Return (outputs,): what gives each output its target variance, from 1 to :data:`LARGEST_GAIN`."""
    fitted = ((weight @ inputs) * weight).sum(1)
    return (variance / fitted.clamp(min=1e-300)).sqrt().clamp(1.0, LARGEST_GAIN)


class _Ends:
    """The endpoints, each once, with the weights of a merge, and hooks on them."""

    def __init__(self, endpoints: Sequence[nn.Module], weights: Sequence[float]) -> None:
        self.models: list[nn.Module] = []
        self.weights: list[float] = []
        for model, weight in zip(endpoints, weights, strict=True):
            places = [k for k, known in enumerate(self.models) if known is model]
            if places:
                self.weights[places[0]] += weight
            else:
                self.models.append(model)
                self.weights.append(weight)

    def mean(self, name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the weighted mean of one value of a layer per endpoint, in float32 or wider."""
        if len({value.shape for value in values}) > 1:
            raise CannotFit(
                f"layers: {name!r} has other samples in each endpoint, of shapes {', '.join(str(tuple(v.shape)) for v in values)}, as "
                'an expert has whose router chooses them; name the other layers, or choose method="repair"'
            )
        work = working_dtype(values[0].dtype)
        total = values[0].to(work) * self.weights[0]
        for weight, value in zip(self.weights[1:], values[1:], strict=True):
            total = torch.add(total, value.to(total), alpha=weight)
        return total


def fit_jointly(
    fits: Sequence[LayerFit],
    ends: tuple[Sequence[nn.Module], Sequence[float]],
    batches: Iterable[Any],
    forward: Forward,
    options: Renormalization,
) -> None:
    """Fit every layer to the mean of the endpoints' inputs and outputs, one batch at a time; then write all layers.

    Args:
        fits: one per layer.
        ends: the endpoints and their weights.
        batches: read once.
        forward: runs a model on a batch.
        options: with ``ridge`` and ``restore_variance``.
    """
    known = _Ends(*ends)
    by_name = {fit.name: fit for fit in fits}
    once = _Once()

    def answer(name: str, values: list[Any]) -> list[Any]:
        once.see(name)
        inputs, outputs = zip(*values, strict=True)
        by_name[name].add(known.mean(name, inputs), known.mean(name, outputs))
        return values

    lockstep = Lockstep(answer)
    with evaluating(*known.models), ExitStack() as hooks:
        for model in known.models:
            for name in by_name:
                meet = partial(_meet_both, lockstep, name)
                hooks.callback(on_call(model.get_submodule(name), meet).remove)
        for batch in batches:
            once.clear()
            for _ in lockstep.run(
                [partial(forward, m, batch) for m in known.models], device_of(known.models[0])
            ):
                pass
    for fit in fits:
        fit.write(options.ridge, restore_variance=options.restore_variance)


def fit_sequentially(
    model: nn.Module,
    fits: Sequence[LayerFit],
    ends: tuple[Sequence[nn.Module], Sequence[float]],
    batches: Sequence[Any],
    forward: Forward,
    options: Renormalization,
    progress: bool | None,
) -> None:
    """Fit layer after layer of ``model``: each to the inputs that the layers before it give now.

    Batch norms of ``model`` are measured on the way.

    Args:
        model: it is changed.
        fits: one per layer of ``model``.
        ends: the endpoints and their weights.
        batches: all of them.
        forward: runs a model on a batch.
        options: with ``ridge`` and ``restore_variance``.
        progress: show a bar; None shows it on a terminal.
    """
    known = _Ends(*ends)
    by_name, norms = {fit.name: fit for fit in fits}, {hook.name: hook for hook in reset_hooks(model)}
    for end in known.models:
        theirs = dict(end.named_modules())
        for name in (*by_name, *norms):
            if name not in theirs:
                raise CannotFit(f"endpoints: one has no module {name!r}, which the model has")
    once, each = _Once(), 1 + len(known.models)

    def answer(name: str, values: list[Any]) -> list[Any]:
        own = values[::each]
        if name in norms:
            norms[name].treat(own, 0)
            return values
        once.see(name)
        for k, inputs in enumerate(own):
            by_name[name].add(inputs, known.mean(name, values[k * each + 1 : (k + 1) * each]))
        by_name[name].write(options.ridge, restore_variance=options.restore_variance)
        return values

    lockstep = Lockstep(answer)
    passes = [partial(forward, m, batch) for batch in batches for m in (model, *known.models)]
    with evaluating(model, *known.models), ExitStack() as hooks:
        for name in (*by_name, *norms):
            # Before the layer runs: it then runs with what was fitted.
            meet = partial(lockstep.meet, name)
            hooks.callback(on_input(model.get_submodule(name), meet).remove)
            for end in known.models:
                meet = partial(_meet_output, lockstep, name)
                hooks.callback(on_call(end.get_submodule(name), meet).remove)
        meetings = lockstep.run(passes, device_of(model))
        for _ in progress_bar(meetings, "layer by layer", show=progress, total=len(by_name) + len(norms)):
            pass
    for hook in norms.values():
        hook.write()


def _meet_output(lockstep: Lockstep, name: str, _inputs: Any, output: Any) -> None:
    lockstep.meet(name, output)


def _meet_both(lockstep: Lockstep, name: str, inputs: Any, output: Any) -> None:
    lockstep.meet(name, (inputs, output))


class _Once:
    """Refuses a layer that a forward pass runs again, because it can have only one solution."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def clear(self) -> None:
        self._seen.clear()

    def see(self, name: str) -> None:
        if name in self._seen:
            raise CannotFit(
                f"layers: {name!r} runs more than once in a forward pass, which least squares cannot fit; name the others"
            )
        self._seen.add(name)
