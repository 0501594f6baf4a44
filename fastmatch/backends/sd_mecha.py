"""sd-mecha's ``rebasin``: implementations of that interface for every architecture whose names sd-mecha lists."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fastmatch._internal.ranks import ALONE
from fastmatch.checkpoint.diffusion.single_file import EMA, prove_file, trace_file
from fastmatch.matching.ascent import Hooks
from fastmatch.matching.weights import WeightMatching, match_weights
from fastmatch.permutations.apply import permute_tensor
from fastmatch.spec import Permutations, PermutationSpec

__all__ = ["CONFIGS", "register"]

CONFIGS = ("sd1-ldm", "sdxl-sgm", "sd3-comfyui", "flux-flux")
"""sd-mecha's names of the architectures that are registered by default."""

_registered: set[str] = set()


def register(*configs: str) -> None:
    """Make sd-mecha's merge method ``rebasin`` align with fastmatch.

    Afterwards ``sd_mecha.rebasin(a, ref, iters)`` takes models of all architectures. It moves whole heads, channels inside their head, hidden
    units and residual streams. Each structure is proved on a reduced model before its first merge, which fails if the proof does. ``iters``
    is the maximum number of sweeps. sd-mecha's own implementation for SDXL stays registered behind ours. A second call changes nothing.

    Example:
        >>> from fastmatch.backends import sd_mecha
        >>> sd_mecha.register()  # then, as before: sd_mecha.rebasin(sd_mecha.model(b), sd_mecha.model(a), iters=10)

    Args:
        configs: names of sd-mecha's model configs; :data:`CONFIGS` if none is given.

    Raises:
        ImportError: sd-mecha or diffusers is not installed.
        ValueError: sd-mecha has no config of that name.
    """
    try:
        from sd_mecha.extensions import merge_methods, model_configs
    except ImportError as error:
        raise ImportError("fastmatch.backends.sd_mecha needs sd-mecha: pip install sd-mecha") from error
    known = [config.identifier for config in model_configs.get_all()]
    for name in configs or CONFIGS:
        if name not in known:
            raise ValueError(f"configs: expected some of {known}, got {name!r}")
        if name in _registered:
            continue
        merge_methods.merge_method(
            _implementation(model_configs.resolve(name)),
            identifier=f"fastmatch_rebasin_{name.replace('-', '_')}",
            implements="rebasin",
        )
        # The first implementation that fits is taken.
        interface: Any = merge_methods.resolve("rebasin").interface
        interface.candidates.insert(0, interface.candidates.pop())
        _registered.add(name)


def _implementation(config: Any) -> type:
    """Return the class of a merge method for one of sd-mecha's model configs."""
    from sd_mecha import Parameter, Return, StateDict

    class Rebasin:
        """One instance serves a merge, so what was matched is kept for the other tensors of the same network."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.found: dict[tuple[str, ...], Permutations] = {}

        @staticmethod
        def map_keys(builder: Any) -> None:
            moved = {name: unit for unit in _units(config) for name in (*unit.names, *unit.followers)}
            for name in config.keys():  # noqa: SIM118 - a method of the config, which is no dict
                unit = moved.get(name)
                matched = unit.names if unit else ()
                own = tuple(dict.fromkeys((*matched, name)))
                read = builder.a.keys[own] & builder.iters.keys[name]
                builder[name] = (read & builder.ref.keys[matched] if matched else read) @ unit

        def __call__(self, a, ref, iters, **kwargs):  # type: ignore[no-untyped-def]
            (name,), unit = kwargs["key_relation"].outputs, kwargs["key_relation"].meta
            if unit is None:
                return {name: a[name]}
            with self.lock:
                if unit.names not in self.found:
                    self.found[unit.names] = unit.match(a, ref, iters)
            return {name: permute_tensor(a[name], name, unit.spec, self.found[unit.names])}

    # sd-mecha reads annotations as objects, which texts are not.
    state = StateDict[torch.Tensor]
    Rebasin.__call__.__annotations__ = {
        "a": Parameter(state, model_config=config),
        "ref": Parameter(state, model_config=config),
        "iters": Parameter(int, model_config=config),
        "return": Return(state, model_config=config),
    }
    return Rebasin


@dataclass(frozen=True)
class _Unit:
    """Tensors that share no group with others, such as those of one network.

    Attributes:
        spec: their structure; that of the running means as well.
        names: the tensors that are matched.
        followers: running means, which move with them.
    """

    spec: PermutationSpec
    names: tuple[str, ...]
    followers: tuple[str, ...]

    def match(self, a: Mapping[str, Any], ref: Mapping[str, Any], iters: int) -> Permutations:
        """Return the permutations that bring ``a`` close to ``ref``."""
        groups = {
            name: replace(group, axes=tuple(x for x in group.axes if x.parameter in self.names))
            for name, group in self.spec.groups.items()
        }
        shapes = {name: self.spec.shapes[name] for name in self.names}
        spec = replace(self.spec, groups=groups, shapes=shapes)
        states = (_Loaded(ref, shapes), _Loaded(a, shapes))
        matcher = WeightMatching(max_sweeps=iters)
        # sd-mecha merges in threads, in no order that ranks could share.
        hooks = Hooks(out_of_core=True, ranks=ALONE)
        return match_weights(*states, spec, matcher, hooks).permutations


class _Loaded(Mapping[str, torch.Tensor]):
    """A state dict of sd-mecha, which loads a tensor whenever it is asked for one; shapes are known before."""

    def __init__(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.state = state
        self.headers = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    @cached_property
    def device(self) -> torch.device:
        """Where sd-mecha loads tensors to, as the smallest one shows."""
        return self[min(self.headers, key=lambda name: self.headers[name].numel())].device

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.state[name]
        if tensor.shape != self.headers[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, sd-mecha's config says {tuple(self.headers[name].shape)}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


@functools.cache
def _units(config: Any) -> tuple[_Unit, ...]:
    """Trace and prove an architecture, and split its structure into parts that do not depend on each other."""
    keys = config.keys()
    shapes = {k: tuple(v.shape) for k, v in keys.items() if not v.optional or k.startswith(EMA)}
    spec = trace_file(shapes, config.identifier)
    prove_file(shapes, spec, config.identifier)
    parts: list[tuple[set[str], set[str]]] = []
    for group in spec.groups.values():
        names, groups = {axis.parameter for axis in group.axes}, {group.name}
        apart = []
        for other in parts:
            if other[0] & names:
                names, groups = names | other[0], groups | other[1]
            else:
                apart.append(other)
        parts = [*apart, (names, groups)]
    return tuple(_unit(spec, names, groups) for names, groups in parts)


def _unit(spec: PermutationSpec, names: set[str], groups: set[str]) -> _Unit:
    part = spec.select([name for name in spec.groups if name in groups])
    shapes = {name: shape for name, shape in spec.shapes.items() if name in names}
    return _Unit(
        replace(part, shapes=shapes, pins=()),
        names=tuple(name for name in shapes if not name.startswith(EMA)),
        followers=tuple(name for name in shapes if name.startswith(EMA)),
    )
