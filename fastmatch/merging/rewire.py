"""The graph of a partial merge: nodes that every model keeps, merged nodes, and the modules between the two.

A node before the boundary exists once per model, with that model's weights. A node after it exists once, with merged
weights. Where a value crosses, a small module joins the models' values into merged units, or maps merged units
back to those of a model.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fastmatch._internal.modules import with_state
from fastmatch._internal.states import working_dtype
from fastmatch.merging.average import merge_states
from fastmatch.merging.mixed_norms import normed_layers, scale_layers, unscale_layers
from fastmatch.merging.units import UnitMaps, on_axis
from fastmatch.spec import Axis
from fastmatch.spec.graph import Structure

__all__ = ["Rewiring", "rewire"]

Placed = tuple[tuple[Axis, str], ...]


class Rewiring:
    """Which nodes of a graph every model keeps.

    Attributes:
        structure: the traced graph.
        many: names of the nodes that exist once per model.
        joined: the groups whose units are merged somewhere, in the spec's order.
        stops: whether the models are apart again at the end, so that each has an output.
        after: names of the parameters and buffers that only nodes after the merged ones hold.
        merged: names of those that merged nodes hold.
    """

    def __init__(
        self,
        structure: Structure,
        start_at: str | int,
        apart: Sequence[str],
        stop_at: str | int | None = None,
    ) -> None:
        self.structure = structure
        self.nodes = list(structure.module.graph.nodes)
        groups = list(structure.spec.groups)
        unknown = [name for name in apart if name not in groups]
        if unknown:
            raise ValueError(f"apart: unknown group {unknown[0]!r}; there are {groups}")
        self._state = structure.module.state_dict()
        cut = self._cut(start_at, groups)
        end = len(self.nodes) if stop_at is None else self._end(stop_at, groups)
        if end <= cut:
            raise ValueError(
                f"stop_at: {stop_at!r} is not after start_at {start_at!r}, so nothing would be merged"
            )
        self.stops = stop_at is not None
        self.many: set[str] = set()
        for k, node in enumerate(self.nodes):
            if self._is_many(node, k < cut, set(apart)) or (k >= end and self._may_be_many(node)):
                self.many.add(node.name)
        users = {"before": self.nodes[:end], "after": self.nodes[end:]}
        held = {
            where: {
                name for node in nodes for n in [node, *node.all_input_nodes] for name in self.parameters(n)
            }
            for where, nodes in users.items()
        }
        self.after = held["after"] - held["before"] if self.stops else set()
        self.merged = {
            name
            for node in self.nodes
            if node.name not in self.many and node.op != "get_attr"
            for n in [node, *(m for m in node.all_input_nodes if m.op == "get_attr")]
            for name in self.parameters(n)
        }
        touched = {group for node in self.nodes for group in self._merged_at(node)}
        self.joined = tuple(name for name in groups if name in touched)

    def parameters(self, node: fx.Node) -> list[str]:
        """Return the names of the parameters and buffers that the node holds."""
        if node.op == "get_attr":
            return [node.target] if node.target in self._state else []  # pyright: ignore[reportReturnType]
        if node.op != "call_module":
            return []
        return [name for name in self._state if name.startswith(f"{node.target}.")]

    def placed(self, node: fx.Node) -> Placed:
        """Return the (axis, group) pairs of the node's value."""
        return self.structure.values.get(node.name, ())

    def _cut(self, start_at: str | int, groups: list[str]) -> int:
        """Return the position of the first node that is merged."""
        if isinstance(start_at, str) and start_at not in groups:
            raise ValueError(f"start_at: unknown group {start_at!r}; there are {groups}")
        position = groups.index(start_at) if isinstance(start_at, str) else int(start_at)
        if not 0 <= position <= len(groups):
            raise ValueError(f"start_at: expected a position of 0 to {len(groups)}, got {start_at}")
        if position == 0:
            return 0
        if position == len(groups):
            return len(self.nodes) - 1  # the output
        group = groups[position]
        return next(k for k, node in enumerate(self.nodes) if group in self._produced(node))

    def _end(self, stop_at: str | int, groups: list[str]) -> int:
        """Return the position after the last layer or norm that produces the group."""
        if isinstance(stop_at, str) and stop_at not in groups:
            raise ValueError(f"stop_at: unknown group {stop_at!r}; there are {groups}")
        position = groups.index(stop_at) if isinstance(stop_at, str) else int(stop_at)
        if not 0 <= position < len(groups):
            raise ValueError(f"stop_at: expected a position of 0 to {len(groups) - 1}, got {stop_at}")
        group = groups[position]
        found = [k for k, node in enumerate(self.nodes) if group in self._made(node)]
        return max(found) + 1

    def _may_be_many(self, node: fx.Node) -> bool:
        return node.op not in ("placeholder", "output")

    def _made(self, node: fx.Node) -> set[str]:
        """Return the groups that leave a parameter of this node, or one that it takes."""
        spec, inputs = self.structure.spec, self.structure.inputs
        held = [
            *self.parameters(node),
            *(p for n in node.all_input_nodes if n.op == "get_attr" for p in self.parameters(n)),
        ]
        if node.op == "get_attr":
            return set()
        return {group for p in held for axis, group in spec.axes_of(p) if (p, axis.dim) not in inputs}

    def _produced(self, node: fx.Node) -> set[str]:
        """Return the groups on the node's value, and those on the output of a layer inside it."""
        spec, inputs = self.structure.spec, self.structure.inputs
        inside = {
            group
            for name in self.parameters(node)
            for axis, group in spec.axes_of(name)
            if (name, axis.dim) not in inputs
        }
        return inside | {group for _, group in self.placed(node)}

    def _is_many(self, node: fx.Node, before: bool, apart: set[str]) -> bool:
        if node.op in ("placeholder", "output"):
            return False
        parts = [n for n in node.all_input_nodes if n.name in self.structure.containers]
        if parts:  # a node that unpacks a tuple stays with the tuple
            return parts[0].name in self.many
        if before:
            own = bool(self.parameters(node))
            return own or any(n.name in self.many for n in node.all_input_nodes)
        return bool(self._produced(node) & apart)

    def _merged_at(self, node: fx.Node) -> set[str]:
        """Return the groups for which this node needs maps."""
        if node.name in self.many:
            return {g for n in node.all_input_nodes if n.name not in self.many for _, g in self.placed(n)}
        own = {group for name in self.parameters(node) for _, group in self.structure.spec.axes_of(name)}
        values = {group for n in [node, *node.all_input_nodes] for _, group in self.placed(n)}
        return own | values


class _Join(nn.Module):
    """Joins the models' values in merged units: ``sum_k weights[k] R_k z_k``."""

    def __init__(
        self, weights: Sequence[float], placed: Placed, sizes: dict[str, int], maps: dict[str, UnitMaps]
    ):
        super().__init__()
        self.weights = tuple(weights)
        self.axes = tuple((axis, sizes[group]) for axis, group in placed)
        self.maps = nn.ModuleList(nn.ModuleList(maps[group].leave) for _, group in placed)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        total = None
        for k, (weight, value) in enumerate(zip(self.weights, values, strict=True)):
            for (axis, size), maps in zip(self.axes, self.maps, strict=True):
                assert isinstance(maps, nn.ModuleList)
                value = on_axis(maps[k], value, axis, size)
            total = value * weight if total is None else torch.add(total, value, alpha=weight)
        assert total is not None
        return total


class _Read(nn.Module):
    """Maps merged units back to those of model k: ``U_k z``."""

    def __init__(self, k: int, placed: Placed, sizes: dict[str, int], maps: dict[str, UnitMaps]) -> None:
        super().__init__()
        self.axes = tuple((axis, sizes[group]) for axis, group in placed)
        self.maps = nn.ModuleList(maps[group].read[k] for _, group in placed)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for (axis, size), unit_map in zip(self.axes, self.maps, strict=True):
            value = on_axis(unit_map, value, axis, size)
        return value


def rewire(
    plan: Rewiring, copies: Sequence[nn.Module], maps: dict[str, UnitMaps], weights: Sequence[float]
) -> fx.GraphModule:
    """Build the module of a partial merge.

    Args:
        plan: which nodes every model keeps.
        copies: the models as ``torch.fx`` sees them; their modules become part of the result.
        maps: group -> how its units are merged, for ``plan.joined``.
        weights: one per model.
    """
    return _Builder(plan, copies, maps, weights).build()


class _Builder:
    """Copies a graph node by node. A value exists once or once per model, and is converted when the other is needed."""

    def __init__(
        self, plan: Rewiring, copies: Sequence[nn.Module], maps: dict[str, UnitMaps], weights: Sequence[float]
    ) -> None:
        self.plan, self.copies, self.maps, self.weights = plan, copies, maps, weights
        self.merged = _merged(plan, copies, maps, weights)
        self.sizes = {name: group.size for name, group in plan.structure.spec.groups.items()}
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.one: dict[fx.Node, fx.Node] = {}
        self.many: dict[fx.Node, list[fx.Node]] = {}

    def build(self) -> fx.GraphModule:
        for node in self.plan.nodes:
            if node.op == "get_attr":
                continue  # created where it is used, once or once per model
            if node.name in self.plan.many:
                self.many[node] = [self._copy(node, k) for k in range(len(self.copies))]
            else:
                self.one[node] = self._copy(node, None)
        module = fx.GraphModule(self.root, self.graph, class_name="PartialMerge")
        return module.eval()

    def _copy(self, node: fx.Node, k: int | None) -> fx.Node:
        """Copy the node with model k's weights, or with merged weights for None."""
        if node.op == "output" and self.plan.stops:
            count = range(len(self.copies))
            return self.graph.output(
                tuple(fx.map_arg(node.args[0], lambda n, j=j: self._as_many(n)[j]) for j in count)
            )
        new = self.graph.node_copy(node, lambda n: self._as_one(n) if k is None else self._as_many(n)[k])
        new.type = None  # annotations may be strings, which do not pickle
        if node.op in ("call_module", "get_attr"):
            source = self.merged if k is None else self.copies[k]
            new.target = f"merged.{node.target}" if k is None else f"apart.{k}.{node.target}"
            self.root[new.target] = operator.attrgetter(str(node.target))(source)
        return new

    def _as_one(self, node: fx.Node) -> fx.Node:
        if node not in self.one:
            if node.op == "get_attr":
                self.one[node] = self._copy(node, None)
            elif node.name in self.plan.structure.values:
                join = _Join(self.weights, self.plan.placed(node), self.sizes, self.maps)
                self.one[node] = self._call(f"join.{node.name}", join, *self.many[node])
            elif node.name in self.plan.structure.containers:
                raise ValueError(
                    f"start_at: {node.name!r} returns several tensors and cannot stay apart where the model returns them; "
                    "choose another start_at"
                )
            else:  # a number, such as a length, is the same for all models
                self.one[node] = self.many[node][0]
        return self.one[node]

    def _as_many(self, node: fx.Node) -> list[fx.Node]:
        if node not in self.many:
            count = range(len(self.copies))
            placed = self.plan.placed(node)
            if node.op == "get_attr":
                self.many[node] = [self._copy(node, k) for k in count]
            elif placed:
                reads = [_Read(k, placed, self.sizes, self.maps) for k in count]
                self.many[node] = [
                    self._call(f"read.{k}.{node.name}", reads[k], self.one[node]) for k in count
                ]
            else:
                self.many[node] = [self.one[node] for _ in count]
        return self.many[node]

    def _call(self, target: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        self.root[target] = module
        return self.graph.call_module(target, inputs)


def _merged(
    plan: Rewiring, copies: Sequence[nn.Module], maps: dict[str, UnitMaps], weights: Sequence[float]
) -> nn.Module:
    """Return the traced module with the parameters of merged nodes merged; groups without maps are averaged as they are."""
    own = [{name: t for name, t in copy.state_dict().items() if name in plan.merged} for copy in copies]
    normed = normed_layers(plan.structure, plan.merged, maps)
    states = [
        {name: _mapped(name, t, plan.structure, maps, k) for name, t in scale_layers(state, normed).items()}
        for k, state in enumerate(own)
    ]
    merged = unscale_layers(merge_states(states, weights), normed, own[0])
    return with_state(copies[0], {**copies[0].state_dict(), **merged})


def _mapped(
    name: str, tensor: torch.Tensor, structure: Structure, maps: dict[str, UnitMaps], k: int
) -> torch.Tensor:
    """Return model k's part of a merged parameter, in float32 or wider."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.detach().to(working_dtype(tensor.dtype))
    for axis, group in structure.spec.axes_of(name):
        if group not in maps:
            continue
        size = structure.spec.groups[group].size
        if (name, axis.dim) in structure.inputs:
            chosen = maps[group].enter[k]
        else:
            chosen = (maps[group].variance if name.endswith("running_var") else maps[group].leave)[k]
        tensor = on_axis(chosen, tensor, axis, size)
    return tensor
