"""Tracing: the ATen operations of one forward pass, with a label on every axis.

The model is run once on a small example under a dispatch mode. Each operation's rule
(:mod:`fastmatch.spec.rules`) unites the labels of axes that it makes equal; at the end every label that is
not pinned and lies on a parameter is a permutation group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmatch.spec.labels import Label, Place, find, pin, places, unify
from fastmatch.spec.rules import RULES, fresh, pin_all, tensors_in
from fastmatch.spec.spec import Axis, Group, PermutationSpec, Pin, Tap

__all__ = ["Tracer", "arguments_of", "counts", "op_name", "plain_operations", "tensors_returned", "trace"]

UNUSED = "not used in the traced forward pass"


def op_name(func: Any) -> str:
    """``aten.relu`` for every overload of the operation."""
    return f"{func.namespace}.{func._schema.name.split('::')[1]}"


def counts(func: Any) -> bool:
    """Whether the operation is counted: torch adds a detach where a mode keeps a new tensor, so that one is not."""
    return func is not torch.ops.aten.detach.default


@contextmanager
def plain_operations() -> Iterator[None]:
    """Attention modules take their ordinary operations instead of a fused one that cannot be looked into."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@dataclass(frozen=True)
class _RawTap:
    op: int
    op_name: str
    role: str
    operand: int
    label: Label
    dim: int


class Tracer(TorchDispatchMode):
    """Carries labels along the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are kept alive while tracing, so that an id stays what it was.
        self._labels: dict[int, tuple[torch.Tensor, list[Label]]] = {}
        self._data: set[int] = set()
        self._used: set[int] = set()
        self._contracted: set[int] = set()
        self._op, self._op_name = -1, ""
        self.taps: list[_RawTap] = []

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor already has labels."""
        return id(tensor) in self._labels

    def labels(self, tensor: torch.Tensor) -> list[Label]:
        """The labels of a tensor's dimensions; a tensor from nowhere is a constant, pinned unless uniform."""
        if not self.knows(tensor):
            self.set(tensor, [_constant_label(tensor, d) for d in range(tensor.ndim)])
        self._used.add(id(tensor))
        return list(self._labels[id(tensor)][1])

    def set(self, tensor: torch.Tensor, labels: Sequence[Label]) -> None:
        """Gives a tensor its labels, one a dimension."""
        sizes = [label.size for label in labels]
        if sizes != list(tensor.shape):
            raise AssertionError(f"rule for {self._op_name}: labels {sizes} for shape {tuple(tensor.shape)}")
        self._labels[id(tensor)] = (tensor, list(labels))

    def mark_data(self, tensor: torch.Tensor) -> None:
        """Says that a tensor depends on the model's inputs, and with it every view of the same memory."""
        self._data.add(_storage(tensor))

    def is_data(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor depends on the model's inputs."""
        return _storage(tensor) in self._data

    def was_used(self, tensor: torch.Tensor) -> bool:
        """Whether an operation read the tensor."""
        return id(tensor) in self._used

    def mark_contracted(self, label: Label) -> None:
        """Says that a product with data sums over this dimension of a parameter: units enter there."""
        self._contracted.add(id(label))

    def contracted(self, tensor: torch.Tensor) -> list[int]:
        """The dimensions of a parameter at which units enter, as far as products with it have shown."""
        return [d for d, label in enumerate(self.labels(tensor)) if id(label) in self._contracted]

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps the labels of a named value of the forward pass as taps of role ``"value"``."""
        for dim, label in enumerate(self.labels(tensor)):
            self.taps.append(_RawTap(self._op, name, "value", -1, label, dim))

    def tap(
        self,
        role: str,
        tensor: torch.Tensor,
        operand: int,
        labels: Sequence[Label],
        dims: Sequence[int] | None = None,
    ) -> None:
        """Notes a place where activations can be read: the labels along ``dims`` of the tensor."""
        if role != "produced" and not self.is_data(tensor):
            return
        for dim in range(len(labels)) if dims is None else dims:
            self.taps.append(_RawTap(self._op, self._op_name, role, operand, labels[dim], dim))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._op += counts(func)
        self._op_name = op_name(func)
        inputs = tensors_in((args, kwargs))
        if any(self.is_data(t) for t in inputs):
            for tensor in tensors_in(out):
                self.mark_data(tensor)
        # What was in `out=` tensors may have other views: their labels hold beside those of the result.
        written = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        earlier = [(t, self.labels(t)) for t in written if self.knows(t)]
        rule = RULES.get(self._op_name.removeprefix("aten."))
        if rule is None or not self._op_name.startswith("aten."):
            if inputs:
                pin_all(self, self._op_name, (args, kwargs), out)
        else:
            try:
                rule(self, self._op_name, args, kwargs, out)
            except Exception as error:
                # A form of the operation that the rule was not written for: as safe as having no rule.
                reason = f"{self._op_name} (its rule failed: {type(error).__name__})"
                pin_all(self, reason, (args, kwargs), out)
        for tensor, before in earlier:
            for old, new in zip(before, self.labels(tensor), strict=False):
                if [x.size for x in before] == list(tensor.shape):
                    unify(old, new, self._op_name)
                else:
                    pin(old, self._op_name)
                    pin(new, self._op_name)
        for tensor in tensors_in(out):
            self.labels(tensor)  # a tensor made from nothing is a constant
        return out


def _storage(tensor: torch.Tensor) -> int:
    """Identity of the memory behind a tensor, alike for all its views."""
    return tensor.untyped_storage()._cdata


def _constant_label(tensor: torch.Tensor, dim: int) -> Label:
    if tensor.shape[dim] <= 1:
        return Label(tensor.shape[dim])
    first = tensor.detach().narrow(dim, 0, 1)
    uniform = bool((tensor.detach() == first).all())
    return Label(tensor.shape[dim], pinned=None if uniform else "constant")


def tensors_returned(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """The tensors in what a model returned: in containers, dataclasses and objects with attributes or slots."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (nn.Module, type, ModuleType)):
        return []
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        parts += [getattr(value, s, None) for s in ([slots] if isinstance(slots, str) else slots)]
    parts += getattr(value, "__dict__", {}).values()
    return [t for part in parts for t in tensors_returned(part, seen)]


def arguments_of(
    example_inputs: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of the model."""
    if isinstance(example_inputs, Mapping) and kwargs is None:
        return (), dict(example_inputs)
    args = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if example_inputs is None:
        args = ()
    return tuple(args), dict(kwargs or {})


def trace(
    model: nn.Module, example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None
) -> PermutationSpec:
    """The permutation groups of ``model``; see :meth:`fastmatch.spec.PermutationSpec.trace`."""
    return run_traced(model, example_inputs, kwargs=kwargs)[0]


def run_traced(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    run: Callable[..., Any] | None = None,
) -> tuple[PermutationSpec, frozenset[tuple[str, int]]]:
    """The groups, and the (parameter, dimension) pairs at which units enter.

    ``run(tracer, *args, **kwargs)`` runs the model where a plain call will not do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    state: dict[str, torch.Tensor] = {
        name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)
    }
    if not state:
        raise ValueError("model: has no parameters or buffers to permute")
    args, keywords = arguments_of(example_inputs, kwargs)
    if not tensors_in((args, keywords)):
        raise ValueError("example_inputs: holds no tensor; give what the model takes, a batch of 2 is enough")
    tracer = Tracer()
    _label_state(tracer, state)
    for tensor in tensors_in((args, keywords)):
        tracer.set(tensor, fresh(tensor.shape, "model input"))
        tracer.mark_data(tensor)
    with _untouched(model):
        with tracer:
            output = run(tracer, *args, **keywords) if run else model(*args, **keywords)
        returned = tensors_returned(output)
        if not returned:
            raise ValueError(
                f"model: returned {type(output).__name__} with no tensor in it; its outputs cannot be held in place"
            )
        for tensor in returned:
            for label in tracer.labels(tensor):
                pin(label, "model output")
        for tensor in state.values():
            if not tracer.was_used(tensor):
                for label in tracer.labels(tensor):
                    pin(label, UNUSED)
        inputs = frozenset((name, dim) for name, t in state.items() for dim in tracer.contracted(t))
        return _spec_of(tracer, state), inputs


def _label_state(tracer: Tracer, state: Mapping[str, torch.Tensor]) -> None:
    """A label for every dimension of the parameters and buffers; those in the same memory share them."""
    views: dict[tuple[Any, ...], list[Label]] = {}
    memory: dict[int, list[tuple[Any, ...]]] = {}
    for tensor in state.values():
        if tracer.knows(tensor):
            continue
        view = (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view not in views:
            views[view] = fresh(tensor.shape)
            if tensor.numel():
                memory.setdefault(view[0], []).append(view)
        tracer.set(tensor, views[view])
    for sharing in memory.values():
        spans = sorted((_span(view), view) for view in sharing) if len(sharing) > 1 else []
        end, last = 0, None
        for (start, stop), view in spans:
            if last is not None and start < end:
                for label in [*views[last], *views[view]]:
                    pin(label, "memory shared with another parameter")
            if stop > end:
                end, last = stop, view


def _span(view: tuple[Any, ...]) -> tuple[int, int]:
    """First byte of a view and the byte after its last."""
    _, offset, shape, stride, dtype = view
    size = dtype.itemsize
    return offset * size, (offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1) * size


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags and buffers are put back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    names = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), plain_operations():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, own in names:
            for name, buffer in own.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version and buffer.shape == value.shape:
                    buffer.copy_(value)


def _spec_of(tracer: Tracer, state: dict[str, torch.Tensor]) -> PermutationSpec:
    found: dict[tuple[str, int], list[Place]] = {}
    for name, tensor in state.items():
        for dim, label in enumerate(tracer.labels(tensor)):
            if label.size > 1:
                found[name, dim] = places(label)
    tap_places = [(raw, place) for raw in tracer.taps for place in places(raw.label)]
    # places() may pin, and pins reach every place of a leaf: only now is it known what moves.
    members: dict[int, list[Axis]] = {}
    leaves: dict[int, Label] = {}
    pins: list[Pin] = []
    for (name, dim), listed in found.items():
        reasons: list[str] = []
        moves = False
        for place in listed:
            leaf = find(place.leaf)
            if leaf.pinned is not None:
                reasons.append(leaf.pinned)
            elif leaf.size > 1:
                moves = True
                leaves[id(leaf)] = leaf
                axis = Axis(name, dim, place.start, place.outer, place.stride, place.inner)
                members.setdefault(id(leaf), []).append(axis)
        # The blocks of a flatten and the positions of a kernel are no hidden units: not worth a line.
        reasons = reasons or ["cut into single units"]
        if not moves and not reasons[0].endswith("(spatial)"):
            pins += [Pin(name, dim, reason) for reason in dict.fromkeys(reasons)]
    order = _order(tap_places, members)
    names = _names(order, members, state)
    groups = {names[k]: Group(names[k], leaves[k].size, tuple(members[k])) for k in order}
    taps = []
    for raw, place in tap_places:
        name = names.get(id(find(place.leaf)))
        if name is not None:
            axis = Axis("", raw.dim, place.start, place.outer, place.stride, place.inner)
            taps.append(Tap(raw.op, raw.op_name, raw.role, raw.operand, name, axis))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return PermutationSpec(groups, shapes, tuple(pins), tuple(dict.fromkeys(taps)))


def _order(tap_places: list[tuple[_RawTap, Place]], members: dict[int, list[Axis]]) -> list[int]:
    """Groups in the order in which the forward pass produces them; those never produced by a layer last."""
    produced = [id(find(p.leaf)) for raw, p in tap_places if raw.role == "produced"]
    return list(dict.fromkeys([k for k in produced if k in members] + list(members)))


def _names(
    order: list[int], members: dict[int, list[Axis]], state: dict[str, torch.Tensor]
) -> dict[int, str]:
    """Each group named after the module of the first weight whose output side it is."""
    names: dict[int, str] = {}
    for k in order:
        first = min(members[k], key=lambda axis: (axis.dim != 0, state[axis.parameter].ndim < 2))
        base = first.parameter.rpartition(".")[0] or first.parameter
        name, count = base, 1
        while name in names.values():
            count += 1
            name = f"{base}.{count}"
        names[k] = name
    return names
