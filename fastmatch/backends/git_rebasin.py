"""``weight_matching`` of Git Re-Basin (Ainsworth et al. 2022) and of its torch ports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.spec import Axis, Group, PermutationSpec

__all__ = ["spec_of", "weight_matching", "weight_matching_with_key"]


def spec_of(ps: Any, params: Mapping[str, Any]) -> PermutationSpec:
    """Convert a library's ``PermutationSpec`` to fastmatch's.

    Args:
        ps: an object with ``perm_to_axes`` (C2M3: ``perm_to_layers_and_axes``): group -> [(parameter, axis), ...].
            Parameters that are missing from ``params`` and axes beyond a tensor's rank are skipped, as are scalars. The
            input axis of a linear layer after a flatten may be a multiple of the channels long.
        params: name -> array. Only the shapes are read.

    Raises:
        TypeError: ``ps`` has neither attribute.
        ValueError: a group has no axis in ``params``, or its axes have different lengths.
    """
    table = getattr(ps, "perm_to_axes", None)
    if table is None:
        table = getattr(ps, "perm_to_layers_and_axes", None)
    if table is None:
        raise TypeError(
            f"ps: expected a spec with perm_to_axes or perm_to_layers_and_axes, got {type(ps).__name__}"
        )
    shapes = {name: tuple(np.shape(value)) for name, value in params.items()}
    groups = {}
    for perm, axes in table.items():
        name = str(perm)
        places = [(p, d) for p, d in axes if p in shapes and d is not None and d < len(shapes[p])]
        if not places:
            raise ValueError(f"ps: no axis of group {name!r} is among the parameters")
        # The channels are those of the layer that gives them; what reads them may be listed first, and be flattened.
        given = [(p, d) for p, d in places if d == 0] or places
        parameter, dim = given[0]
        size = shapes[parameter][dim]
        channels = any(d in (0, 1) and len(shapes[p]) > 2 for p, d in places)
        found = []
        for p, d in dict.fromkeys(places):
            length = shapes[p][d]
            flattened = channels and d == 1 and len(shapes[p]) == 2 and length % size == 0
            if length != size and not flattened:
                raise ValueError(f"ps: group {name!r} has {size} units, axis {d} of {p!r} has {length}")
            found.append(
                Axis(p, d, inner=length // size)
            )  # the positions of a channel are next to each other
        groups[name] = Group(name, size, tuple(found))
    return PermutationSpec(groups, shapes)


def weight_matching(
    ps: Any,
    params_a: Mapping[str, Any],
    params_b: Mapping[str, Any],
    max_iter: int = 100,
    init_perm: Mapping[str, Any] | None = None,
    silent: bool = True,
    *,
    seed: int | None = None,
    **ignored: Any,
) -> dict[str, Any]:
    """Find the permutations of ``params_b`` that bring it close to ``params_a``.

    Signature and result are those of the torch ports. Every array that ``ps`` names contributes to the objective.

    Args:
        ps: the library's own spec, see :func:`spec_of`.
        params_a, params_b: name -> torch tensor, or name -> anything that numpy reads (jax arrays).
        max_iter: maximum number of sweeps over the groups.
        init_perm: permutations to start from; the greedy initialization by default.
        silent: False shows a progress bar.
        seed: seed for the order of the groups. By default it is drawn from torch's global generator, from which the
            ports draw the order.
        ignored: options of single ports (``device``, ``normalize``) that have no effect here.

    Returns:
        ``{group: perm}`` with ``new_b[i] = b[perm[i]]``. Permutations are LongTensors if ``params_a`` holds tensors only,
        int64 numpy arrays otherwise.
    """
    is_torch = all(isinstance(value, torch.Tensor) for value in params_a.values())
    a = {name: _tensor(value) for name, value in params_a.items()}
    b = {name: _tensor(value) for name, value in params_b.items()}
    if seed is None:
        seed = int(torch.randint(0, 2**31 - 1, size=(1,), device="cpu"))
    spec = spec_of(ps, a)
    start = {str(k): _tensor(v).long() for k, v in (init_perm or {}).items()}
    matcher = WeightMatching(start, max_sweeps=max_iter, include="statistics", seed=seed)
    found = match_weights(a, b, spec, matcher, progress=None if silent else True)
    table = getattr(ps, "perm_to_axes", None) or ps.perm_to_layers_and_axes
    return {
        perm: found.permutations[str(perm)] if is_torch else found.permutations[str(perm)].numpy()
        for perm in table
    }


def _tensor(value: Any) -> torch.Tensor:
    """Return a tensor unchanged and any other array as a copy, because jax's arrays are read-only."""
    return (
        value.detach() if isinstance(value, torch.Tensor) else torch.as_tensor(np.array(value), device="cpu")
    )


def weight_matching_with_key(
    rng: Any, ps: Any, params_a: Mapping[str, Any], params_b: Mapping[str, Any], *args: Any, **options: Any
) -> dict[str, Any]:
    """Call :func:`weight_matching` with Git Re-Basin's own signature: a jax random key first, which seeds the order."""
    words = np.asarray(rng).ravel().astype(np.uint64).tolist()
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    return weight_matching(ps, params_a, params_b, *args, seed=seed, **options)
