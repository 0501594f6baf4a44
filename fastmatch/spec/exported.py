"""The forward pass of a module as torch.export sees it, as a graph on the module's own parameters.

torch.fx runs the model's code on stand-ins for values, which code that asks for shapes or takes ``**kwargs`` cannot bear.
torch.export runs it on the example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

__all__ = ["export_graph"]


def export_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, Any]]:
    """Return the graph of a forward pass, and the constants (by attribute) that it reads besides the model's state.

    The first dimension of every input is free where the model's operations allow that. A mapping that the model returns
    is a dict of tensors in the graph; other structures are a tuple of tensors.
    """

    def free(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, torch.Tensor) and value.ndim else None

    shapes = {"args": tuple(map(free, args)), "kwargs": {k: free(v) for k, v in kwargs.items()}}
    flat = (*shapes["args"], *shapes["kwargs"].values())
    with torch.no_grad():
        program = torch.export.export(model, args, dict(kwargs) or None, dynamic_shapes=flat, strict=False)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    state, constants = set(dict(model.state_dict())), {}
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()

    def copy(node: fx.Node) -> fx.Node:
        """Copy a node; attributes are read where they are used first, as in graphs of torch.fx."""
        if node not in copied:
            if node.op == "get_attr" and node.target not in state:
                name = f"constant_{len(constants)}"
                constants[name] = _attribute(module, str(node.target))
                copied[node] = graph.get_attr(name)
            else:
                copied[node] = graph.node_copy(node, copy)
        return copied[node]

    for node in module.graph.nodes:
        if node.op == "output":
            outputs = [copy(part) for part in node.args[0]]
            graph.output(_returned(outputs, program.call_spec.out_spec))
        elif node.op != "get_attr" and not _is_check(node):
            copy(node)
    return graph, constants


def _is_check(node: fx.Node) -> bool:
    return node.op == "call_module" or (node.op == "call_function" and "_assert" in str(node.target))


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _returned(outputs: list[fx.Node], structure: Any) -> Any:
    """Return what the graph returns: one tensor, a dict for a mapping of tensors, or a tuple."""
    if structure.num_nodes == 1:
        return outputs[0]
    keys = structure.context[-1] if isinstance(structure.context, tuple) else structure.context
    names = list(keys) if isinstance(keys, (list, tuple)) and all(isinstance(k, str) for k in keys) else []
    if len(names) == len(outputs) == structure.num_nodes - 1:
        return dict(zip(names, outputs, strict=True))
    return tuple(outputs)
