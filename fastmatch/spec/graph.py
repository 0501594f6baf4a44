"""A module's forward pass as a graph, with the units that lie on every value in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fastmatch.spec.rules import tensors_in
from fastmatch.spec.spec import Axis, PermutationSpec
from fastmatch.spec.trace import Tracer, arguments_of, run_traced

__all__ = ["Structure", "trace_graph"]


@dataclass(frozen=True)
class Structure:
    """A traced graph and where the units lie in it.

    Attributes:
        module: the model as ``torch.fx`` sees it; shares the model's parameters.
        spec: the groups, as :meth:`PermutationSpec.trace` finds them but for those that hold others (heads).
        values: node name -> the (axis, group) pairs of the tensor it computes.
        containers: names of nodes that compute a tuple, list or dict of tensors.
        inputs: the (parameter, dimension) pairs at which units enter; elsewhere they leave.
    """

    module: fx.GraphModule
    spec: PermutationSpec
    values: dict[str, tuple[tuple[Axis, str], ...]]
    containers: frozenset[str]
    inputs: frozenset[tuple[str, int]]


class _Watching(fx.Interpreter):
    """Runs a graph and notes the labels of every tensor it computes."""

    def __init__(self, module: fx.GraphModule, tracer: Tracer) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.tracer, self.tensors, self.containers = tracer, set[str](), set[str]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.tracer.note(n.name, value)
            self.tensors.add(n.name)
        elif tensors_in(value):
            self.containers.add(n.name)
        return value


def trace_graph(model: nn.Module, example_inputs: Any) -> Structure:
    """The graph of a ``model`` in eval mode, from ``torch.fx``, with units on its values from one run.

    Raises:
        TypeError: not a module.
        ValueError: ``torch.fx`` cannot follow the forward pass (control flow on values), or it does not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"models: expected torch modules, got {type(model).__name__}")
    args, kwargs = arguments_of(example_inputs, None)
    module = _symbolic(model, args, kwargs)
    names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
    inputs = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    watching: list[_Watching] = []

    def run(tracer: Tracer, *values: Any) -> Any:
        watching.append(_Watching(module, tracer))
        return watching[0].run(*values)

    try:
        spec, entered = run_traced(module, tuple(inputs), run=run)
    except RuntimeError as error:
        raise ValueError(f"example_inputs: the model does not run on them ({error})") from error
    values: dict[str, list[tuple[Axis, str]]] = {name: [] for name in watching[0].tensors}
    spec = spec.flat()
    for site in spec.sites:
        if site.role == "value":
            values[site.op_name].append((site.axis, site.group))
    spec = replace(spec, sites=tuple(t for t in spec.sites if t.role != "value"))
    placed = {name: tuple(found) for name, found in values.items()}
    return Structure(module, spec, placed, frozenset(watching[0].containers), entered)


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.GraphModule:
    """The graph for the inputs given; arguments left out keep their defaults."""
    parameters = inspect.signature(model.forward).parameters
    given = {*list(parameters)[: len(args)], *kwargs}
    constants = {
        name: p.default
        for name, p in parameters.items()
        if name not in given and p.default is not inspect.Parameter.empty
    }
    try:
        return fx.symbolic_trace(model, concrete_args=constants or None)
    except Exception as error:  # whatever the model's own code does with a proxy
        raise ValueError(
            f"models: torch.fx cannot follow the forward pass of {type(model).__name__} ({error}); a partial "
            "merge rewires it and needs one without control flow on values"
        ) from error
