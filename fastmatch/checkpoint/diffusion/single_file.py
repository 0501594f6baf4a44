"""Trace and prove the networks in a single file, in the names of the file.

The tracer follows the operations of a model, and renaming is slicing, joining and transposing. So a module that has the
file's tensors as its parameters, and runs the networks of diffusers with what it makes of them, is traced like any other:
its groups are in the names of the file, and the proof covers the renaming.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastmatch.checkpoint.diffusion.components import (
    Component,
    Kind,
    build_component,
    find_components,
    parameters_of,
)
from fastmatch.checkpoint.diffusion.layout import Shapes, assemble
from fastmatch.permutations.verify import Verification, joined, verify
from fastmatch.spec import PermutationSpec
from fastmatch.spec.hollow import hollow_tensor

__all__ = [
    "FileModel", "check_rest", "prove_components", "prove_file", "reduced_model", "running_means", "trace_file",
    "with_running_mean",
]  # fmt: skip

log = logging.getLogger("fastmatch")

EMA = "model_ema."
"""Start of the names of a running mean of the UNet's weights."""

FACTORS = (16, 8, 4, 2, 1)
"""By which the sizes of a reduced model are divided; the first that keeps heads and group norms whole is taken."""

SMALL, LARGEST = 20_000_000, 100_000_000
"""Parameters up to which a network is proved as it is, and above which a reduced one is not run."""

FITS_AS_IT_IS = "move these tensors to a file of their own, which fits the aligned UNet as it is"

WITH_UNET = {
    "control_model.": FITS_AS_IT_IS,
    "adapter.": FITS_AS_IT_IS,
    "ip_adapter.": "leave these tensors out: they read units that move, and fit the UNet only in the order that it has",
    "lora_unet_": "move these tensors to a file of their own, and permute it with `fastmatch apply PERMUTATIONS FILE`",
}
"""Starts of names of networks and factors that read the units of the UNet or add to them -> what to do with those that are not known."""


class _Runner(nn.Module):
    """Calls a component's module as its kind says."""

    def __init__(self, component: Component, model: nn.Module) -> None:
        super().__init__()
        self.model, self.call = model, component.kind.call

    def __deepcopy__(self, memo: object) -> _Runner:
        return self  # it runs with the parameters that it is given, and keeps nothing

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self.model, *inputs)


class FileModel(nn.Module):
    """The networks of a file as one module that has the tensors of the file as its parameters.

    Args:
        components: the networks.
        shapes: name in the file -> shape; those of the file, or of a reduced model.
        scale: by which the reduced model is smaller.
        hollow: the parameters take no memory: see :func:`hollow_tensor`.
    """

    def __init__(
        self, components: Iterable[Component], shapes: Shapes, scale: int = 1, *, hollow: bool = True
    ) -> None:
        super().__init__()
        self._runners: tuple[tuple[Component, _Runner, dict[str, tuple[int, ...]]], ...] = ()
        self.examples: tuple[torch.Tensor, ...] = ()
        for component in components:
            own = {name: tuple(shapes[component.prefix + name]) for name in component.shapes}
            model: Any = build_component(component, own, scale)
            sizes = parameters_of(model)
            self._runners += ((component, _Runner(component, model), sizes),)
            self.examples += component.kind.inputs(model.config)
            for name, shape in own.items():
                self._add(component.prefix + name, shape, hollow=hollow)

    def _add(self, name: str, shape: tuple[int, ...], *, hollow: bool) -> None:
        """Register a parameter under a name with dots."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(len(self.examples) + sum(map(ord, name)))
        tensor = hollow_tensor(shape, generator) if hollow else _random(shape, last, generator)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))

    def _tensor(self, name: str) -> torch.Tensor:
        """Return a parameter by attribute access, which may read it from a file."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            module = module._modules[part]  # type: ignore[assignment]
        return getattr(module, last)

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        """Return the outputs of every network."""
        outputs, given = [], iter(inputs)
        for component, runner, sizes in self._runners:
            own = {name: self._tensor(component.prefix + name) for name in component.shapes}
            parameters = {
                f"model.{name}": _parameter(own, component, name, shape) for name, shape in sizes.items()
            }
            count = len(component.kind.inputs(runner.model.config))
            outputs.append(functional_call(runner, parameters, tuple(next(given) for _ in range(count))))
        return outputs


def _parameter(
    tensors: Mapping[str, torch.Tensor], component: Component, name: str, shape: tuple[int, ...]
) -> torch.Tensor:
    """Return a parameter made from the file; the scale or shift of a norm that the file leaves out is one or zero."""
    if name in component.layout:
        return assemble(tensors, component.layout[name], shape)
    like = next(iter(tensors.values()))
    return like.new_ones(shape) if name.endswith("weight") else like.new_zeros(shape)


def _random(shape: tuple[int, ...], last: str, generator: torch.Generator) -> torch.Tensor:
    """Return weights of a size that keeps activations of order one."""
    noise = torch.randn(shape, generator=generator, device="cpu")
    if len(shape) < 2:
        return noise * 0.3 + (1 if last in ("weight", "scale") else 0)
    return noise * (noise[0].numel() ** -0.5)


def trace_file(shapes: Shapes, argument: str) -> PermutationSpec:
    """Trace the networks of a single file from the names and shapes of its tensors.

    Args:
        shapes: name -> shape of every tensor in the file.
        argument: the file in errors.

    Returns:
        The :class:`fastmatch.PermutationSpec` in the names of the file. The running mean of the UNet's weights, if there
        is one, moves with them.

    Raises:
        ImportError: diffusers is not installed (the extra ``diffusers``).
        ValueError: no network is found, or one does not fit its architecture. The file and the tensor are named.
    """
    components = find_components(shapes, argument)
    if not components:
        raise ValueError(
            f"{argument}: no network of a diffusion model is found in its tensors, such as {next(iter(shapes), None)!r}; "
            "give --model or a spec"
        )
    check_rest(shapes, {c.prefix + name for c in components for name in c.shapes}, argument)
    model = FileModel(components, shapes)
    return with_running_mean(PermutationSpec.trace(model, model.examples), shapes, argument)


def check_rest(shapes: Shapes, owned: Collection[str], argument: str) -> None:
    """Raise ValueError if a network that reads the units of another is in the file, but not in ``owned``."""
    for name in shapes:
        advice = next((advice for start, advice in WITH_UNET.items() if name.startswith(start)), None)
        if advice is not None and name not in owned:
            raise ValueError(
                f"{argument}: tensor {name!r} belongs to what is added to the UNet, and is of no network that is known in one file "
                f"with it; {advice}"
            )


def running_means(names: Iterable[str], shapes: Shapes) -> dict[str, str]:
    """Return name -> that of its running mean in the same file, which has no dots; of those that have one."""
    found: dict[str, str] = {}
    for name in names:
        flat = name.removeprefix("model.").replace(".", "")
        for twin in (EMA + flat, EMA + flat.removeprefix("diffusion_model")):
            if name.startswith("model.") and shapes.get(twin) == shapes[name]:
                found[name] = twin
    return found


def with_running_mean(spec: PermutationSpec, shapes: Shapes, argument: str) -> PermutationSpec:
    """Add the running means in a file to the groups of the weights that they follow; a line names those that follow none."""
    means = running_means(spec.shapes, shapes)
    alone = [name for name in shapes if name.startswith(EMA) and shapes[name] and name not in means.values()]
    if alone:
        log.warning(
            "%s: %d running means follow no weight of the file and keep their order, such as %s", argument, len(alone),
            ", ".join(alone[:3]),
        )  # fmt: skip
    twins = {name: mean for name, mean in means.items() if mean not in spec.shapes}
    groups = {}
    for name, group in spec.groups.items():
        more = tuple(replace(x, parameter=twins[x.parameter]) for x in group.axes if x.parameter in twins)
        groups[name] = replace(group, axes=group.axes + more)
    return replace(
        spec, groups=groups, shapes={**spec.shapes, **{t: spec.shapes[n] for n, t in twins.items()}}
    )


def reduced_model(components: list[Component], factor: int) -> FileModel:
    """Return a model of the same networks with the same names, whose sizes are divided by ``factor``.

    Channels, heads' sizes and group norms shrink alike. The number of layers and of heads stays.

    Raises:
        ValueError: a network cannot be divided so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for component in components:
        own = {
            name: tuple(_smaller(component.kind, name, n, factor) for n in shape)
            for name, shape in component.shapes.items()
        }
        if component.is_module:
            own = parameters_of(build_component(component, own, factor))
        shapes |= {component.prefix + name: shape for name, shape in own.items()}
    if sum(map(math.prod, shapes.values())) > LARGEST:
        raise ValueError(f"more than {LARGEST} parameters are left")
    return FileModel(components, shapes, factor, hollow=False)


def _smaller(kind: Kind, name: str, size: int, factor: int) -> int:
    """Return a size of a tensor in a reduced model."""
    if name.endswith(kind.of_head):
        return size // factor
    return size // factor if size > 64 and size % factor == 0 and size not in kind.fixed else size


def prove_file(shapes: Shapes, spec: PermutationSpec, argument: str) -> Verification:
    """Verify on reduced models with the same names and layers that permuting a file by a spec keeps its function.

    Raises:
        ValueError: permuting changes the function, or a reduced model moves otherwise than ``spec`` says.
    """
    return prove_components(find_components(shapes, argument), spec, argument)


def prove_components(components: list[Component], spec: PermutationSpec, argument: str) -> Verification:
    """Verify reduced models of networks. Each is proved by itself, because none reads the units of another.

    Raises:
        ValueError: see :func:`prove_file`.
    """
    proofs = [_prove(component, spec, argument) for component in components]
    return joined(proofs, (group for proof in proofs for group in proof.groups))


def _prove(component: Component, spec: PermutationSpec, argument: str) -> Verification:
    failed: Exception | None = None
    is_small = sum(map(math.prod, component.shapes.values())) <= SMALL
    for factor in FACTORS[-1:] if is_small else FACTORS:
        try:
            model = reduced_model([component], factor)
            small = PermutationSpec.trace(model, model.examples)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            failed = error
            continue
        if _moved(small, component.prefix) == _moved(spec, component.prefix):
            return verify(model, small, model.examples)
    reason = f" ({failed})" if failed else ""
    raise ValueError(
        f"{argument}: no reduced model of its {component.kind.role} moves as the structure says{reason}"
    )


def _moved(spec: PermutationSpec, prefix: str) -> set[frozenset[tuple[str, int]]]:
    """Return which dimensions of a component's parameters move together."""
    moved = (
        frozenset((x.parameter, x.dim) for x in group.axes if not x.parameter.startswith(EMA))
        for group in spec.groups.values()
    )
    return {axes for axes in moved if axes and next(iter(axes))[0].startswith(prefix)}
