"""The published algorithms, written plainly: what fastmatch is measured against.

Weight matching: coordinate descent of Git Re-Basin (Ainsworth et al. 2022, algorithm 1), in numpy (float64) and, as the
ports have it, in torch (float32). Activation matching: one Pearson correlation per layer (Li et al. 2015). Only axes that
cover a whole dimension are supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from fastmatch.permutations.apply import apply_permutations
from fastmatch.spec import PermutationSpec


def permuted(b, spec: PermutationSpec, perms, name: str, skip: int | None = None) -> np.ndarray:
    """Return the array ``name`` of ``b`` with its groups permuted, except along the dimension ``skip``."""
    w = b[name]
    for axis, group in spec.axes_of(name):
        if axis.dim != skip:
            assert axis.inner == axis.outer == 1
            assert axis.start == 0
            w = np.take(w, perms[group], axis=axis.dim)
    return w


def objective(a, b, spec: PermutationSpec, perms) -> float:
    """Return the sum of inner products of A's parameters with B's permuted ones."""
    names = {x.parameter for g in spec.groups.values() for x in g.axes}
    return sum(float((a[n] * permuted(b, spec, perms, n)).sum()) for n in names)


def gain(a, b, spec: PermutationSpec, group, perms) -> np.ndarray:
    """Return the matrix of a group's gains: what every pair of its units adds to the objective, in float64."""
    total = np.zeros((group.size, group.size))
    for axis in group.axes:
        rows_a = np.moveaxis(a[axis.parameter], axis.dim, 0).reshape(group.size, -1)
        other = permuted(b, spec, perms, axis.parameter, skip=axis.dim)
        total += rows_a @ np.moveaxis(other, axis.dim, 0).reshape(group.size, -1).T
    return total


def gain_torch(a, b, spec: PermutationSpec, group, perms) -> torch.Tensor:
    """Return what :func:`gain` does, in torch and float32, on the tensors' device."""
    total = torch.zeros(group.size, group.size, device=a[group.axes[0].parameter].device)
    for axis in group.axes:
        other = b[axis.parameter]
        for place, name in spec.axes_of(axis.parameter):
            if place.dim != axis.dim:
                other = torch.index_select(other, place.dim, perms[name])
        rows_a = torch.moveaxis(a[axis.parameter], axis.dim, 0).reshape(group.size, -1)
        total += rows_a @ torch.moveaxis(other, axis.dim, 0).reshape(group.size, -1).T
    return total


def coordinate_descent(
    spec: PermutationSpec,
    identity: Callable[[int], Any],
    step: Callable[[Any, dict[str, Any]], tuple[Any, bool]],
    seed: int,
    max_sweeps: int,
) -> dict[str, Any]:
    """Match every group in a random order, sweep after sweep, until a sweep improves none.

    ``step`` takes a group and all permutations. It returns the group's new permutation, and whether it is better.
    """
    perms = {name: identity(group.size) for name, group in spec.groups.items()}
    names = list(spec.groups)
    generator = np.random.default_rng(seed)
    for _ in range(max_sweeps):
        progress = False
        for k in generator.permutation(len(names)):
            perms[names[k]], better = step(names[k], perms)
            progress |= better
        if not progress:
            break
    return perms


def weight_matching(state_a, state_b, spec: PermutationSpec, seed: int, max_sweeps: int = 100):
    """Return the permutations and the objective of the published algorithm, in numpy and float64."""
    a, b = ({k: v.double().numpy() for k, v in s.items()} for s in (state_a, state_b))

    def step(name, perms):
        group = spec.groups[name]
        values, rows = gain(a, b, spec, group, perms), np.arange(group.size)
        columns = linear_sum_assignment(values, maximize=True)[1]
        return columns, values[rows, columns].sum() > values[rows, perms[name]].sum() + 1e-12

    perms = coordinate_descent(spec, np.arange, step, seed, max_sweeps)
    return perms, objective(a, b, spec, perms)


def weight_matching_torch(a, b, spec: PermutationSpec, seed: int, max_sweeps: int = 100):
    """Return the permutations of the published algorithm, in torch and float32, on the tensors' device; scipy solves.

    A sweep has to gain more than rounding (1e-6 of the gain), or it would never end.
    """
    device = next(iter(a.values())).device

    def step(name, perms):
        group = spec.groups[name]
        values, rows = gain_torch(a, b, spec, group, perms), torch.arange(group.size, device=device)
        columns = torch.from_numpy(linear_sum_assignment(values.cpu().numpy(), maximize=True)[1]).to(device)
        new, old = (float(values[rows, c].double().sum()) for c in (columns, perms[name]))
        return columns, new > old + 1e-6 * abs(new)

    return coordinate_descent(spec, lambda n: torch.arange(n, device=device), step, seed, max_sweeps)


def merge_many_torch(states, spec: PermutationSpec, seed: int, max_rounds: int = 100):
    """Return the permutations of every model: each is matched to the mean of the others, round after round.

    This is algorithm 3 of Git Re-Basin, in torch and float32.
    """
    generator = np.random.default_rng(seed)
    names = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    placed = [dict(state) for state in states]
    orders = [{name: torch.arange(group.size) for name, group in spec.groups.items()} for _ in states]
    for _ in range(max_rounds):
        has_moved = False
        for k in generator.permutation(len(states)):
            others = [state for i, state in enumerate(placed) if i != k]
            mean = {name: sum(state[name] for state in others) / len(others) for name in names}
            found = weight_matching_torch(mean, placed[k], spec, seed)
            has_moved |= any(not torch.equal(p, torch.arange(len(p))) for p in found.values())
            orders[k] = {name: orders[k][name][p] for name, p in found.items()}
            placed[k] = apply_permutations(states[k], spec, orders[k])
        if not has_moved:
            break
    return orders


def activation_matching_by_layer(model_a, model_b, layers: dict[str, str], data):
    """Match as REPAIR does (Jordan et al. 2022): one pass over the data for each layer, through the layers before it."""
    columns, correlations = {}, {}
    for group, layer in layers.items():
        parts = [torch.nn.Sequential(*list(m.children())[: int(layer) + 1]) for m in (model_a, model_b)]
        found = activation_matching(*parts, {group: layer}, data())
        columns |= found[0]
        correlations |= found[1]
    return columns, correlations


def activation_matching(model_a, model_b, layers: dict[str, str], data: Iterable[torch.Tensor]):
    """Match all groups in one pass. Return the columns and the correlations by group, pooled over batches in float64."""
    modules = [dict(m.named_modules()) for m in (model_a, model_b)]
    read: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for k in range(2):
        for group, layer in layers.items():

            def keep(module, inputs, output, key=(k, group)):
                read[key] = output.movedim(1, -1).reshape(-1, output.shape[1]).double()

            hooks.append(modules[k][layer].register_forward_hook(keep))
    sums: dict[str, list[torch.Tensor]] = {}
    count = {}
    with torch.no_grad():
        for x in data:
            model_a(x), model_b(x)
            for group in layers:
                u, v = read[0, group], read[1, group]
                new = [u.T @ v, u.sum(0), v.sum(0), (u * u).sum(0), (v * v).sum(0)]
                sums[group] = [s + t for s, t in zip(sums[group], new, strict=True)] if group in sums else new
                count[group] = count.get(group, 0) + len(u)
    for hook in hooks:
        hook.remove()
    columns, correlations = {}, {}
    for group, (cross, su, sv, uu, vv) in sums.items():
        n = count[group]
        covariance = cross / n - torch.outer(su, sv) / n**2
        std = torch.outer(
            (uu / n - (su / n) ** 2).clamp(min=0).sqrt(), (vv / n - (sv / n) ** 2).clamp(min=0).sqrt()
        )
        correlation = torch.where(std > 1e-9, covariance / std.clamp(min=1e-9), 0.0)
        columns[group] = linear_sum_assignment(correlation.cpu().numpy(), maximize=True)[1]
        correlations[group] = correlation
    return columns, correlations
