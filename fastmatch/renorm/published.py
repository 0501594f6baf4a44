"""The layers that the paper's code renormalizes: the convolutions of a VGG, and those inside the blocks of a ResNet."""

from __future__ import annotations

import operator
from typing import Literal, TypeAlias

import torch
from torch import fx, nn

__all__ = ["Published", "published_layers"]

Published: TypeAlias = Literal["published"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def published_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the convolutions that the paper's code renormalizes, in forward order.

    These are all convolutions of a network without residual additions. With them, these are the convolutions on the
    longer path between the points where a residual stream splits and where it is added again: not the stem, which is
    before the first split, and not shortcuts. Linear layers never are.

    Raises:
        ValueError: the model has no such convolution, or ``torch.fx`` cannot follow its forward pass.
    """
    try:
        module = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    except Exception as error:  # whatever the model's own code does with a proxy
        raise ValueError(
            f'layers: "published" needs a forward pass that torch.fx can follow ({error}); give the layers by name'
        ) from error
    convolutions = {
        node: str(node.target)
        for node in module.graph.nodes
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _CONVOLUTIONS)
    }
    before: dict[fx.Node, set[fx.Node]] = {}
    inside: set[fx.Node] = set()
    is_residual = False
    for node in module.graph.nodes:
        before[node] = {node}.union(*(before[n] for n in node.all_input_nodes))
        operands = [n for n in node.args if isinstance(n, fx.Node)]
        if node.target in _ADDITIONS and len(operands) == 2:
            branches = [before[a] - before[b] for a, b in (operands, operands[::-1])]
            found = [branch & convolutions.keys() for branch in branches]
            is_residual = is_residual or any(found)
            inside |= max(found, key=len)
    names = dict.fromkeys(n for node, n in convolutions.items() if node in inside or not is_residual)
    if not names:
        raise ValueError(
            'layers: "published" means convolutions, and the model has none; give the layers by name'
        )
    return tuple(names)
