"""A module's forward pass as a graph, with the groups of units on every value in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fastmatch._internal.words import error_line
from fastmatch.spec.axes import Axis
from fastmatch.spec.exported import export_graph
from fastmatch.spec.operations import tensors_in
from fastmatch.spec.running import arguments_of, examples_that_run
from fastmatch.spec.spec import PermutationSpec
from fastmatch.spec.trace import Tracer, trace

__all__ = ["Structure", "trace_graph"]


@dataclass(frozen=True)
class Structure:
    """A traced graph and the units on its values.

    Attributes:
        module: the model as ``torch.fx`` sees it; shares the model's parameters.
        spec: the groups that :meth:`PermutationSpec.trace` finds, without groups that contain subgroups (heads).
        values: node name -> the (axis, group) pairs of the tensor it computes.
        containers: names of nodes that compute a tuple, list or dict of tensors.
        inputs: the (parameter, dimension) pairs at which units enter; at other axes they leave.
        constants: attributes that the graph reads and the model has not.
    """

    module: fx.GraphModule
    spec: PermutationSpec
    values: dict[str, tuple[tuple[Axis, str], ...]]
    containers: frozenset[str]
    inputs: frozenset[tuple[str, int]]
    constants: Mapping[str, Any] = field(default_factory=dict)

    def on(self, model: nn.Module) -> fx.GraphModule:
        """Return the graph on the parameters of another model of the architecture."""
        return module_on(model, self.module.graph, self.constants)


class _Watching(fx.Interpreter):
    """Runs a graph and records the labels of every tensor it computes."""

    def __init__(self, module: fx.GraphModule, tracer: Tracer) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.tracer, self.tensors, self.containers = tracer, set[str](), set[str]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.tracer.record.mark_value(self.tracer.number, n.name, value)
            self.tensors.add(n.name)
        elif tensors_in(value):
            self.containers.add(n.name)
        return value


def trace_graph(model: nn.Module, example_inputs: Any) -> Structure:
    """Trace ``model`` in eval mode with ``torch.fx``, else with ``torch.export``, and the units on the graph's values in one run.

    Raises:
        TypeError: ``model`` is not a torch module.
        ValueError: neither can follow the forward pass (control flow on values), or it does not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"models: expected torch modules, got {type(model).__name__}")
    args, kwargs = arguments_of(example_inputs, None)
    module, constants = _followed(model, args, kwargs)
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    watching: list[_Watching] = []

    def run(tracer: Tracer, *values: Any) -> Any:
        watching.append(_Watching(module, tracer))
        return watching[0].run(*values)

    with examples_that_run():
        found = trace(module, tuple(inputs), run=run)
    values: dict[str, list[tuple[Axis, str]]] = {name: [] for name in watching[0].tensors}
    spec = PermutationSpec(found.groups, found.shapes, found.pins, found.sites).flat()
    for site in spec.sites:
        if site.role == "value":
            values[site.op_name].append((site.axis, site.group))
    spec = replace(spec, sites=tuple(s for s in spec.sites if s.role != "value"))
    placed = {name: tuple(found) for name, found in values.items()}
    containers = frozenset(watching[0].containers)
    return Structure(module, spec, placed, containers, found.entries, constants)


def _followed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Return the graph for the given inputs, of torch.fx or else of torch.export, and constants that it reads."""
    try:
        return _symbolic(model, args, kwargs), {}
    except Exception as error:  # whatever the model's own code does with a proxy
        reason = error
    try:
        graph, constants = export_graph(model, args, kwargs)
    except Exception as error:  # whatever it does that cannot be exported
        cache = getattr(getattr(model, "config", None), "use_cache", False)
        advice = (
            "; model.config.use_cache = False leaves out the cache, which cannot be traced" if cache else ""
        )
        raise ValueError(
            f"models: neither torch.fx ({error_line(reason, 160)}) nor torch.export ({error_line(error, 160)}) can follow the forward pass of "
            f"{type(model).__name__}; a partial merge rewires the graph and needs a forward pass without control flow on "
            f"values{advice}"
        ) from error
    return module_on(model, graph, constants), constants


def module_on(model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any]) -> fx.GraphModule:
    """Return a graph on the parameters of ``model``, which takes the constants as attributes."""
    for name, value in constants.items():
        setattr(model, name, value)
    return fx.GraphModule(model, graph)


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.GraphModule:
    """Return the graph that torch.fx makes for the given inputs; other arguments keep their defaults."""
    parameters = inspect.signature(model.forward).parameters
    given = {*list(parameters)[: len(args)], *kwargs}
    constants = {
        name: p.default
        for name, p in parameters.items()
        if name not in given and p.default is not inspect.Parameter.empty
    }
    return fx.symbolic_trace(model, concrete_args=constants or None)
