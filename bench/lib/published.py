"""The published algorithms, written plainly: what ours is measured against.

Weight matching: coordinate descent of Git Re-Basin (Ainsworth et al. 2022, algorithm 1): every group in a random
order, every sweep, until a sweep gains nothing; in numpy (float64) and, as the ports have it, in torch
(float32). Activation matching: one Pearson correlation a layer (Li et al. 2015). Plain axes only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from fastmatch.spec import PermutationSpec


def moved(b, spec: PermutationSpec, perms, name: str, skip: int | None = None) -> np.ndarray:
    w = b[name]
    for axis, group in spec.axes_of(name):
        if axis.dim != skip:
            assert axis.inner == axis.outer == 1
            assert axis.start == 0
            w = np.take(w, perms[group], axis=axis.dim)
    return w


def objective(a, b, spec: PermutationSpec, perms) -> float:
    names = {x.parameter for g in spec.groups.values() for x in g.axes}
    return sum(float((a[n] * moved(b, spec, perms, n)).sum()) for n in names)


def weight_matching(state_a, state_b, spec: PermutationSpec, seed: int, max_sweeps: int = 100):
    a, b = ({k: v.double().numpy() for k, v in s.items()} for s in (state_a, state_b))
    perms = {name: np.arange(group.size) for name, group in spec.groups.items()}
    names = list(spec.groups)
    generator = np.random.default_rng(seed)
    for _ in range(max_sweeps):
        progress = False
        for k in generator.permutation(len(names)):
            group = spec.groups[names[k]]
            gain = np.zeros((group.size, group.size))
            for axis in group.axes:
                rows_a = np.moveaxis(a[axis.parameter], axis.dim, 0).reshape(group.size, -1)
                other = moved(b, spec, perms, axis.parameter, skip=axis.dim)
                gain += rows_a @ np.moveaxis(other, axis.dim, 0).reshape(group.size, -1).T
            col = linear_sum_assignment(gain, maximize=True)[1]
            rows = np.arange(group.size)
            progress |= gain[rows, col].sum() > gain[rows, perms[names[k]]].sum() + 1e-12
            perms[names[k]] = col
        if not progress:
            break
    return perms, objective(a, b, spec, perms)


def weight_matching_torch(a, b, spec: PermutationSpec, seed: int, max_sweeps: int = 100):
    """The same in torch, float32; a sweep has to gain more than rounding (1e-6 of the gain), or it never ends."""
    perms = {name: torch.arange(group.size) for name, group in spec.groups.items()}
    names = list(spec.groups)
    generator = np.random.default_rng(seed)
    for _ in range(max_sweeps):
        progress = False
        for k in generator.permutation(len(names)):
            group = spec.groups[names[k]]
            gain = torch.zeros(group.size, group.size)
            for axis in group.axes:
                other = b[axis.parameter]
                for place, name in spec.axes_of(axis.parameter):
                    if place.dim != axis.dim:
                        other = torch.index_select(other, place.dim, perms[name])
                rows_a = torch.moveaxis(a[axis.parameter], axis.dim, 0).reshape(group.size, -1)
                gain += rows_a @ torch.moveaxis(other, axis.dim, 0).reshape(group.size, -1).T
            col = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            rows = torch.arange(group.size)
            new, old = (float(gain[rows, c].double().sum()) for c in (col, perms[names[k]]))
            progress |= new > old + 1e-6 * abs(new)
            perms[names[k]] = col
        if not progress:
            break
    return perms


def activation_matching_by_layer(model_a, model_b, layers: dict[str, str], data):
    """REPAIR's form (Jordan et al. 2022): every layer's correlation in a pass of its own, through the layers before it."""
    columns, correlations = {}, {}
    for group, layer in layers.items():
        parts = [torch.nn.Sequential(*list(m.children())[: int(layer) + 1]) for m in (model_a, model_b)]
        found = activation_matching(*parts, {group: layer}, data())
        columns |= found[0]
        correlations |= found[1]
    return columns, correlations


def activation_matching(model_a, model_b, layers: dict[str, str], data: Iterable[torch.Tensor]):
    """Group -> columns: correlation of the outputs of each group's layer, pooled over batches in float64."""
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
        columns[group] = linear_sum_assignment(correlation.numpy(), maximize=True)[1]
        correlations[group] = correlation
    return columns, correlations
