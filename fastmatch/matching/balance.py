"""Balance units: choose the scale of each hidden unit that a ReLU network leaves open.

A unit between positively homogeneous operations (ReLU, leaky ReLU, pooling, adding) may be scaled by c > 0: its incoming
weights and bias times c, its outgoing weights divided by c. The function is the same, but weights of two such networks
are not comparable. The balanced network is the one with the smallest sum of squared weights: there, the incoming and the
outgoing weights of every unit have equal norms. It does not depend on the scales that the network came with.

A depthwise convolution reads a unit and gives it on: its bias is scaled like the unit, and its weight stays as it is. So the scale of
a unit before such a layer and the scale after it are one number here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import check_module
from fastmatch._internal.modules import with_state
from fastmatch._internal.states import State, check_finite, state_of
from fastmatch.permutations.disturb import disturb_weights, disturbed
from fastmatch.permutations.precise import double_copy, in_double, largest_difference, outputs_of
from fastmatch.spec import Axis, PermutationSpec
from fastmatch.spec.running import examples_of
from fastmatch.spec.trace import trace

__all__ = ["Balanced", "balance", "scaled_at_random"]

TOLERANCE = 1e-9
"""Largest relative difference of outputs, in float64, between a network and the same one with other scales."""
ROUNDS = 3
"""Runs of the proof: on the weights as they are, and on disturbed ones."""
LARGEST_POWER = 12
"""Scales of the proof are powers of two, which floats multiply exactly: random ones from 2^-12 to 2^12, then all units by
2^12, then all by 2^-12. These reach the bounds of clipped activations and take values out of them."""
HOMOGENEOUS = {"relu", "leaky_relu", "_prelu_kernel"}
"""The activations that scales pass. A trace names those that it knows; the others must pass the proof."""
CONVERGED = 1e-9
MAX_SWEEPS = 10_000


@dataclass(frozen=True, eq=False)
class Balanced:
    """A balanced network.

    Example:
        >>> found = fm.balance(model_a, x)
        >>> torch.allclose(found.model(x), model_a(x), atol=1e-4)
        True

    Attributes:
        model: a copy with the same function.
        scales: group -> (size,) float64: what the units' incoming weights were multiplied by.
        left_alone: names of the groups that may not be scaled, because something on the way is not positively
            homogeneous: another activation, a norm, a product of two activations.
    """

    model: nn.Module
    scales: dict[str, torch.Tensor]
    left_alone: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Balanced({len(self.scales)} groups, left alone: {', '.join(self.left_alone) or 'none'})"


@torch.inference_mode(False)
def balance(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> Balanced:
    """Return a copy of the same function whose units have incoming and outgoing weights of equal norms.

    Balance both networks before they are aligned and merged, if their units may have been scaled, as by folding norms
    into weights, or by other optimizers or initializations. Two networks that differ only in the scales of units become
    the same network.

    Example:
        >>> a, b = (fm.balance(model, x).model for model in (model_a, model_b))
        >>> merged = fm.merge([a, fm.align(a, b, x).apply(b)])

    Args:
        model: it is not changed.
        example_inputs: a tensor, a tuple of positional inputs, or several of these as :class:`Examples`; a batch of 2 is
            enough. The groups of units are traced on them. Whether a group may be scaled is proved on them, as
            :func:`fastmatch.verify` proves a spec: with random scales, in float64, on the weights as they are and on
            disturbed weights and inputs.
        seed: of the proof.

    Returns:
        :class:`Balanced`. Groups that may not be scaled are listed, and stay as they are. So do units without
        incoming or outgoing weights, and the weights of depthwise convolutions, before and after which a unit has one scale.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: weights are NaN or infinite (the tensor is named), or the model does not run.

    Source:
        Neyshabur et al. 2015 (Path-SGD); Stock et al. 2019 (Equi-normalization of neural networks).
    """
    check_module(model, "model")
    state = state_of(model, "model")
    check_finite(state, "model")
    found = trace(model, example_inputs)
    spec = PermutationSpec(found.groups, found.shapes, found.pins, found.sites).flat()
    passed = _depthwise(model)
    sides = {name: _Sides.of(spec, name, found.entries, passed) for name in spec.groups}
    bent = {s.group for s in spec.sites if s.role == "activation" and _base(s.op_name) not in HOMOGENEOUS}
    usable = [name for name, side in sides.items() if side.leave and side.enter and name not in bent]
    examples = examples_of(example_inputs, None)
    proved = _homogeneous(model, usable, sides, examples, seed) if usable else []
    scales = _balancing_scales(state, [sides[name] for name in proved])
    new = _scaled(state, [(sides[name], scales[name]) for name in proved])
    left = tuple(name for name in spec.groups if name not in scales)
    return Balanced(with_state(model, new), scales, left)


def scaled_at_random(model: nn.Module, example_inputs: Any, *, seed: int) -> nn.Module:
    """Return a copy of the same function whose units, where they may be scaled, are: by 2 to the power of a normal number."""
    generator = torch.Generator("cpu").manual_seed(seed)
    found = trace(model, example_inputs)
    spec = PermutationSpec(found.groups, found.shapes, found.pins, found.sites).flat()
    scales, passed = [], _depthwise(model)
    for name in balance(model, example_inputs).scales:
        sides = _Sides.of(spec, name, found.entries, passed)
        values = torch.exp2(torch.randn(sides.size, generator=generator, dtype=torch.float64, device="cpu"))
        scales.append((sides, values))
    return with_state(model, _scaled(state_of(model, "model"), scales))


def _depthwise(model: nn.Module) -> frozenset[str]:
    """Return the weights of depthwise convolutions, which a unit enters and leaves with one scale."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = (
        (n, m) for n, m in model.named_modules() if isinstance(m, kinds) and m.groups == m.in_channels > 1
    )
    return frozenset(f"{name}.weight" if name else "weight" for name, _ in found)


def _base(op_name: str) -> str:
    """Return the name of an ATen operation without its namespace, and the same in place."""
    return op_name.rpartition(".")[2].removesuffix("_")


@dataclass(frozen=True)
class _Sides:
    """The axes at which a group's units leave a parameter, and those at which they enter one, except ``passed`` ones, which do both."""

    name: str
    size: int
    leave: tuple[Axis, ...]
    enter: tuple[Axis, ...]

    @classmethod
    def of(
        cls, spec: PermutationSpec, name: str, entries: frozenset[tuple[str, int]], passed: frozenset[str]
    ) -> _Sides:
        group = spec.groups[name]
        axes = [a for a in group.axes if a.parameter not in passed]
        enter = tuple(a for a in axes if (a.parameter, a.dim) in entries)
        return cls(name, group.size, tuple(a for a in axes if a not in enter), enter)

    def along(self, axis: Axis, values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Return (size,) values at the units' places of an axis and one elsewhere, shaped to multiply ``tensor``."""
        places = axis.positions(self.size)
        line = torch.ones(tensor.shape[axis.dim], dtype=values.dtype, device="cpu")
        line[places] = values[None, :, None].expand(places.shape)
        shape = [1] * tensor.ndim
        shape[axis.dim] = -1
        return line.view(shape)


def _scaled(state: State, scales: Sequence[tuple[_Sides, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the state with the units of each group scaled; computed in float64."""
    new = dict(state)
    work: dict[str, torch.Tensor] = {}
    for sides, values in scales:
        for axes, factor in ((sides.leave, values), (sides.enter, 1 / values)):
            for axis in axes:
                tensor = work.get(axis.parameter)
                if tensor is None:
                    tensor = state[axis.parameter].detach().to(device="cpu", dtype=torch.float64, copy=True)
                    work[axis.parameter] = tensor
                axis.slice_of(tensor).mul_(sides.along(axis, factor, axis.slice_of(tensor)))
    for name, tensor in work.items():
        new[name] = tensor.to(state[name])
    return new


def _homogeneous(
    model: nn.Module, names: list[str], sides: dict[str, _Sides], examples: list[Any], seed: int
) -> list[str]:
    """Return the groups whose units may be scaled without changing the outputs, all of them together."""
    double = double_copy(model)
    generator = torch.Generator("cpu").manual_seed(seed)
    cases: list[tuple[nn.Module, tuple[Any, Any]]] = []
    for round_ in range(ROUNDS):
        for example in examples:
            other = double_copy(double)
            inputs = in_double(example)
            if round_:
                disturb_weights(other, generator)
                inputs = tuple(disturbed(part, generator) for part in inputs)
            cases.append((other, inputs))
    at_random = {
        name: torch.randint(
            -LARGEST_POWER, LARGEST_POWER + 1, (sides[name].size,), generator=generator, device="cpu"
        )
        for name in names
    }
    all_alike = [{name: torch.full_like(p, k) for name, p in at_random.items()} for k in (1, -1)]
    draws = [at_random, *({n: LARGEST_POWER * p for n, p in draw.items()} for draw in all_alike)]
    expected = [outputs_of(case, *inputs, seed=seed) for case, inputs in cases]

    def holds(chosen: list[str]) -> bool:
        for powers in draws:
            scales = [(sides[name], torch.exp2(powers[name].double())) for name in chosen]
            for before, (case, inputs) in zip(expected, cases, strict=True):
                changed = with_state(case, _scaled(state_of(case, "model"), scales))
                if not largest_difference(before, outputs_of(changed, *inputs, seed=seed)) <= TOLERANCE:
                    return False
        return True

    if holds(names):
        return names
    return [name for name in names if holds([name])]


def _balancing_scales(state: State, groups: Sequence[_Sides]) -> dict[str, torch.Tensor]:
    """Return the scales that minimize the sum of squared weights, by group.

    The sum is convex in the logarithms of the scales. One group is solved at a time, the others held.
    """
    parameters = {axis.parameter for g in groups for axis in (*g.leave, *g.enter)}
    squares = {n: state[n].detach().to("cpu", torch.float64).square() for n in sorted(parameters)}
    scales = {g.name: torch.ones(g.size, dtype=torch.float64, device="cpu") for g in groups}
    for _ in range(MAX_SWEEPS):
        largest = 0.0
        for group in groups:
            incoming, outgoing = (_sums(group, axes, squares) for axes in (group.leave, group.enter))
            alive = (incoming > 0) & (outgoing > 0)
            # A parameter that the group both leaves and enters moves twice, so half a step is taken.
            both = {a.parameter for a in group.leave} & {a.parameter for a in group.enter}
            step = torch.where(alive, outgoing / incoming, torch.ones_like(incoming)) ** (
                0.125 if both else 0.25
            )
            largest = max(largest, float(step.log().abs().max()))
            scales[group.name] *= step
            for axes, factor in ((group.leave, step.square()), (group.enter, step.square().reciprocal())):
                for axis in axes:
                    part = axis.slice_of(squares[axis.parameter])
                    part.mul_(group.along(axis, factor, part))
        if largest <= CONVERGED:
            break
    return scales


def _sums(group: _Sides, axes: Sequence[Axis], squares: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (size,) sums of squares over everything at each unit."""
    total = torch.zeros(group.size, dtype=torch.float64, device="cpu")
    for axis in axes:
        part = axis.slice_of(squares[axis.parameter])
        others = [d for d in range(part.ndim) if d != axis.dim % part.ndim]
        line = part.sum(others) if others else part
        total += line[axis.positions(group.size)].sum((0, 2))
    return total
