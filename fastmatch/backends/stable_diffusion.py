"""``weight_matching`` of the scripts that merge Stable Diffusion checkpoints: ogkalu2's, sdnext's and sd-meh's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fastmatch.backends.git_rebasin import spec_of
from fastmatch.backends.patch_target import UNSUPPORTED, PatchTarget
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.permutations.apply import permute_tensor

__all__ = ["TARGETS", "replacement", "weight_matching"]

PARAMETERS = {"ps", "params_a", "params_b", "max_iter", "init_perm", "usefp16", "device"}
"""Parameters by which the scripts' function is told from others of that name."""


# parameters: those of the scripts
def weight_matching(
    ps: Any,
    params_a: Mapping[str, torch.Tensor],
    params_b: Mapping[str, torch.Tensor],
    max_iter: int = 1,
    init_perm: Mapping[str, torch.Tensor] | None = None,
    usefp16: bool = False,
    device: str | torch.device = "cpu",
    groups: Sequence[str] | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Find the permutations of ``params_b`` that bring it close to ``params_a``.

    Example:
        >>> from types import SimpleNamespace
        >>> from fastmatch.backends import stable_diffusion
        >>> ps = SimpleNamespace(perm_to_axes={"P_0": [("w0", 0), ("w1", 1)]})
        >>> a, b = ({"w0": torch.randn(30, 8), "w1": torch.randn(4, 30)} for _ in "ab")
        >>> perm, average = stable_diffusion.weight_matching(ps, a, b, max_iter=10)

    The scripts' specs do not keep the function of a model for every group, and this function does what their spec says.
    ``fastmatch align`` finds the structure itself and proves it.

    Args:
        ps: the script's spec: ``perm_to_axes`` is group -> [(parameter, axis), ...].
        params_a, params_b: name -> tensor. Tensors that a model lacks do not count.
        max_iter: the maximum number of sweeps over the groups; 0 changes nothing.
        init_perm: permutations to start from; the present order by default.
        usefp16: round the tensors to float16 first. Products are in float32 in any case.
        device: where the products are computed, and where the permutations are returned.
        groups: which groups move; all by default. The others stay as ``init_perm`` says.

    Returns:
        ``{group: perm}`` with ``new_b[i] = b[perm[i]]`` for every group, and by how much the objective rose for each group that
        moved.

    Raises:
        ValueError: a group's axes have different lengths, a tensor has another shape in the other model, or ``groups`` names
            none of the spec's.
    """
    table = {str(name): axes for name, axes in ps.perm_to_axes.items()}
    unknown = [name for name in groups or () if name not in table]
    if unknown:
        raise ValueError(f"groups: expected some of the spec's, got {unknown[0]!r}")
    present = {
        name: [(p, d) for p, d in axes if p in params_a and p in params_b and d < params_a[p].ndim]
        for name, axes in table.items()
    }
    sizes = {name: params_a[axes[0][0]].shape[axes[0][1]] for name, axes in present.items() if axes}
    start = {name: torch.arange(size) for name, size in sizes.items()}
    start |= {str(name): torch.as_tensor(p).cpu().long() for name, p in (init_perm or {}).items()}
    chosen = [name for name in (groups or sizes) if name in sizes]
    if max_iter == 0 or not chosen:
        return {name: p.to(device) for name, p in start.items()}, 0.0
    names = {parameter for name in chosen for parameter, _ in present[name]}

    def loaded(params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: params[name].detach().to(device) for name in names}
        return {name: tensor.half() if usefp16 else tensor for name, tensor in tensors.items()}

    a, b = loaded(params_a), loaded(params_b)
    still = {name: axes for name, axes in present.items() if name not in chosen and axes}
    still = {name: [place for place in axes if place[0] in names] for name, axes in still.items()}
    fixed = spec_of(SimpleNamespace(perm_to_axes={name: axes for name, axes in still.items() if axes}), b)
    b = {name: permute_tensor(tensor, name, fixed, start) for name, tensor in b.items()}
    spec = spec_of(SimpleNamespace(perm_to_axes={name: present[name] for name in chosen}), a)
    matcher = WeightMatching(
        {name: start[name] for name in chosen}, max_sweeps=max_iter, include="statistics"
    )
    found = match_weights(a, b, spec, matcher, progress=None)
    moved = sum(not torch.equal(found.permutations[name], start[name]) for name in chosen)
    rise = found.objective[-1] - found.objective[0]
    permutations = {name: p.to(device) for name, p in (start | found.permutations).items()}
    return permutations, rise / max(moved, 1)


def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that uses ours, and the script's own for what ours does not support.

    It moves the groups that the original moves: those of its argument ``special_layers`` or ``groups``, otherwise those that its code
    names, otherwise all.
    """
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        return original
    if not signature.parameters.keys() >= PARAMETERS:
        return original

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        named = [text for text in _texts(original) if text in given["ps"].perm_to_axes]
        groups = given.get("special_layers") or given.get("groups") or named or None
        try:
            return weight_matching(**{name: given[name] for name in PARAMETERS}, groups=groups)
        except UNSUPPORTED:
            return original(*args, **kwargs)

    return function


def _texts(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the texts among the constants of a function's code."""
    waiting = list(getattr(getattr(function, "__code__", None), "co_consts", ()))
    while waiting:
        constant = waiting.pop(0)
        if isinstance(constant, tuple):
            waiting[:0] = constant
        elif isinstance(constant, str):
            yield constant


TARGETS = (
    PatchTarget("ogkalu2", "weight_matching", "weight_matching", replacement),
    PatchTarget("sdnext", "modules.merging.merge_rebasin", "weight_matching", replacement),
    PatchTarget("sd-meh", "sd_meh.rebasin", "weight_matching", replacement),
)
