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

from fastmatch.spec.grouping import UNUSED, spec_of
from fastmatch.spec.labels import Label, find, is_pinned, pin, product, segments, split_sum, sum_of, unify
from fastmatch.spec.rules import FACTORIES, RULES, fresh, pin_all, tensors_in
from fastmatch.spec.rules_indexing import KEEPS_POSITIONS, USES_POSITIONS
from fastmatch.spec.spec import PermutationSpec

__all__ = [
    "Tracer",
    "arguments_of",
    "counts",
    "op_name",
    "outputs_named",
    "plain_operations",
    "tensors_returned",
    "trace",
]


def op_name(func: Any) -> str:
    """``aten.relu`` for every overload of the operation."""
    return f"{func.namespace}.{func._schema.name.split('::')[1]}"


def counts(func: Any) -> bool:
    """Whether the operation is counted: torch adds a detach where a mode keeps a new tensor, so that one is not."""
    return func is not torch.ops.aten.detach.default


@contextmanager
def plain_operations(model: nn.Module | None = None, experts: str = "batched_mm") -> Iterator[None]:
    """Models take their ordinary operations instead of fused ones that cannot be looked into.

    Torch's attention modules leave their fast path. Transformers' mixtures of experts run as ``experts`` says:
    ``"batched_mm"`` computes every token's experts by one product, where a trace can follow which; ``"eager"``, a
    loop over the experts that are hit, is as good to compare outputs and takes no copies of their weights. They
    return no caches, whose keys and values would be held in place as outputs.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    before = _settings(model)
    torch.backends.mha.set_fastpath_enabled(False)
    for config, name, _ in before:
        setattr(config, name, PLAIN.get(name, experts))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        for config, name, value in before:
            setattr(config, name, value)


PLAIN = {"use_cache": False}
"""Settings of transformers' configs that add to what a forward pass returns: the caches of keys and values."""


def _settings(model: nn.Module | None) -> list[tuple[Any, str, Any]]:
    """(config, name, present value) of every setting inside a model that is to be another one."""
    found: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for module in model.modules() if model is not None else ():
        config = getattr(module, "config", None)
        for name, kind in (("_experts_implementation_internal", str), ("use_cache", bool)):
            value = getattr(config, name, None)
            if isinstance(value, kind):
                found[id(config), name] = config, name, value
    return [*found.values()]


@dataclass(frozen=True)
class RawSite:
    """A place to read activations at, before it is known which groups there are."""

    op: int
    op_name: str
    role: str
    operand: int
    labels: tuple[Label, ...]
    dim: int


@dataclass(frozen=True)
class Slice:
    """What stands for ``leaf`` in the slice at ``position`` of the axis ``along``."""

    leaf: Label
    along: Label
    position: int
    inside: Label


class Tracer(TorchDispatchMode):
    """Carries labels along the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are kept alive while tracing, so that an id stays what it was.
        self._labels: dict[int, tuple[torch.Tensor, list[Label]]] = {}
        self._data: set[int] = set()
        self.hollow: set[int] = set()
        self._used: set[int] = set()
        self._contracted: set[int] = set()
        self._op, self._op_name = -1, ""
        self.sites: list[RawSite] = []
        self.slices: dict[tuple[int, int, int], Slice] = {}
        self._sliced: set[int] = set()
        self._unread: dict[int, tuple[Label, str]] = {}
        self._positions: dict[int, tuple[torch.Tensor, Label]] = {}
        self._followers: dict[int, list[Label]] = {}
        self.contractions: list[tuple[Label, tuple[Label, ...]]] = []

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor already has labels."""
        return id(tensor) in self._labels

    def labels(self, tensor: torch.Tensor) -> list[Label]:
        """The labels of a tensor's dimensions; a tensor from nowhere is a constant, pinned unless uniform."""
        if not self.knows(tensor):
            self.set(tensor, [_constant_label(tensor, d) for d in range(tensor.ndim)])
        self._used.add(id(tensor))
        if id(tensor) in self._unread:
            pin(*self._unread.pop(id(tensor)))
        return list(self._labels[id(tensor)][1])

    def set(self, tensor: torch.Tensor, labels: Sequence[Label]) -> None:
        """Gives a tensor its labels, one a dimension."""
        sizes = [label.size for label in labels]
        if sizes != list(tensor.shape):
            raise AssertionError(f"rule for {self._op_name}: labels {sizes} for shape {tuple(tensor.shape)}")
        self._labels[id(tensor)] = (tensor, list(labels))

    def all_labels(self) -> Iterator[list[Label]]:
        """The labels of every tensor seen."""
        return (labels for _, labels in self._labels.values())

    def contract(self, label: Label, beside: Sequence[Label] = ()) -> None:
        """Says that an operation sums over ``label``, for every position of the axes ``beside`` it apart."""
        self.contractions.append((label, tuple(beside)))

    def mixed(self, labels: Sequence[Label], dims: set[int]) -> None:
        """Says that an operation mixes positions along ``dims``: other axes keep one order for all of them."""
        for d, label in enumerate(labels):
            if d not in dims:
                self.contract(label, [x for k, x in enumerate(labels) if k not in dims and k != d])

    def inside(
        self, labels: Sequence[Label], dim: int, position: int, name: str, out: torch.Tensor
    ) -> list[Label]:
        """The labels of one slice along ``dim``, which is pinned once an operation reads the slice ``out``.

        The other axes get labels of their own there: the three slices of a fused query, key and value may
        move apart. They are united with the whole tensor's again where that turns out not to hold.
        """
        along, rest = find(labels[dim]), [*labels[:dim], *labels[dim + 1 :]]
        cuttable = along.kind == "leaf" and along.size > 1
        if cuttable and (along.pinned is None or id(along) in self._sliced):
            self._sliced.add(id(along))
            rest = [self._slice(label, along, position) for label in rest]
        if along.kind == "sum":  # only the segment that the slice lies in
            for segment in segments(along):
                if position < segment.size:
                    along = segment
                    break
                position -= segment.size
            if along.size == 2:
                split_sum(along, [1, 1])
                return rest
        self._unread[id(out)] = (along, name)  # a slice taken for its shape alone holds nothing in place
        return rest

    def _slice(self, label: Label, along: Label, position: int) -> Label:
        leaf = find(label)
        if leaf.size <= 1 or is_pinned(leaf):
            return label
        if leaf.kind != "leaf":
            parts = [self._slice(part, along, position) for part in leaf.parts]
            return product(parts) if leaf.kind == "product" else sum_of(parts)
        key = (id(leaf), id(along), position)
        if key not in self.slices:
            self.slices[key] = Slice(leaf, along, position, Label(leaf.size))
        return self.slices[key].inside

    def positions(self, tensor: torch.Tensor) -> Label | None:
        """The label that a tensor's integers are positions along, if they are."""
        return self._positions[id(tensor)][1] if id(tensor) in self._positions else None

    def set_positions(self, tensor: torch.Tensor, along: Label) -> None:
        """Says that a tensor's integers are positions along a label."""
        self._positions[id(tensor)] = (tensor, along)

    def following(self, index: torch.Tensor, along: Label) -> list[Label]:
        """The labels of rows picked by ``index``: in one dimension, each row knows its position along ``along``."""
        labels = self.labels(index)
        if index.ndim != 1:
            return labels
        known = self._followers.setdefault(id(index), [])
        if not known:
            known.append(Label(index.shape[0], "same", labels, follows=along))
        return known

    def forget_mixed_positions(self) -> None:
        """Rows picked by different indices into one axis cannot be told apart: none of them is known."""
        by_axis: dict[int, list[Label]] = {}
        for (label,) in self._followers.values():
            assert label.follows is not None
            by_axis.setdefault(id(find(label.follows)), []).append(label)
        for labels in by_axis.values():
            for label in labels if len(labels) > 1 else []:
                label.follows = None

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
        """Keeps the labels of a named value of the forward pass as sites of role ``"value"``."""
        labels = tuple(self.labels(tensor))
        self.sites += [RawSite(self._op, name, "value", -1, labels, dim) for dim in range(tensor.ndim)]

    def mark_site(
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
            self.sites.append(RawSite(self._op, self._op_name, role, operand, tuple(labels), dim))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._op_name = op_name(func)
        out = self._hollow_result(args) if self.hollow else None
        if out is None:
            out = func(*args, **kwargs)
        self._op += counts(func)
        inputs = tensors_in((args, kwargs))
        if any(self.is_data(t) for t in inputs):
            for tensor in tensors_in(out):
                self.mark_data(tensor)
        # What was in `out=` tensors may have other views: their labels hold beside those of the result.
        written = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        earlier = [(t, self.labels(t)) for t in written if self.knows(t)]
        self._follow_positions(args, inputs, out)
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
            if not self.knows(tensor):
                self.labels(tensor)  # a tensor made from nothing is a constant
        return out

    def _hollow_result(self, args: tuple[Any, ...]) -> torch.Tensor | None:
        """Something of the right shape where a parameter without memory of its own would be copied out whole.

        A product with it is as good as zero, and what an index picks from it is a view of it again: labels come from
        the operations, not from the numbers.
        """
        base = self._op_name.removeprefix("aten.")
        operands = [t for t in args if isinstance(t, torch.Tensor)]
        if not any(_storage(t) in self.hollow for t in operands):
            return None
        if base in ("mm", "bmm"):
            return args[0].new_zeros(*args[0].shape[:-1], args[1].shape[-1])
        if base == "addmm":
            return args[1].new_zeros(args[1].shape[0], args[2].shape[1])
        if (
            base == "index"
            and len(args[1]) == 1
            and args[1][0] is not None
            and not args[1][0].dtype.is_floating_point
        ):
            data, index = args[0], args[1][0]
            if index.dtype != torch.bool:
                shape = (*index.shape, *data.shape[1:])
                return data.as_strided(shape, (0,) * index.ndim + tuple(data.stride()[1:]))
        return None

    def _follow_positions(self, args: tuple[Any, ...], inputs: list[torch.Tensor], out: Any) -> None:
        """Carries positions along where an operation keeps them; where it does arithmetic on them, pins."""
        held = [t for t in inputs if self.positions(t) is not None]
        base = self._op_name.removeprefix("aten.")
        keeps = bool(held) and base in KEEPS_POSITIONS and args[0] is held[0]
        for tensor in held:
            along = self.positions(tensor)
            assert along is not None
            if keeps and tensor is args[0]:
                for result in tensors_in(out):
                    if not result.is_floating_point():
                        self.set_positions(result, along)
            elif base not in FACTORIES and (base not in USES_POSITIONS or tensor is args[0]):
                pin(along, self._op_name)


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


def outputs_named(output: Any, names: Sequence[str] | None) -> list[torch.Tensor]:
    """The tensors of what a model returned: all, or those of the attributes or keys ``names``.

    Raises:
        ValueError: a name that the output does not have.
    """
    if names is None:
        return tensors_returned(output)
    found = []
    for name in names:
        part = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if part is None:
            raise ValueError(
                f"outputs: {name!r} is not in what the model returned, a {type(output).__name__}"
            )
        found += tensors_returned(part)
    return found


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | Callable[[Any], Sequence[str] | None] | None = None,
) -> PermutationSpec:
    """The permutation groups of ``model``; see :meth:`fastmatch.spec.PermutationSpec.trace`.

    ``outputs`` may also be a function that chooses from what the model returned.
    """
    return run_traced(model, example_inputs, kwargs=kwargs, outputs=outputs)[0]


def run_traced(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    run: Callable[..., Any] | None = None,
    outputs: Sequence[str] | Callable[[Any], Sequence[str] | None] | None = None,
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
    tracer.hollow = {_storage(t) for t in state.values() if t.untyped_storage().nbytes() < t.nbytes}
    for tensor in tensors_in((args, keywords)):
        tracer.set(tensor, fresh(tensor.shape, "model input"))
        tracer.mark_data(tensor)
    with _untouched(model):
        with tracer:
            output = run(tracer, *args, **keywords) if run else model(*args, **keywords)
        returned = outputs_named(output, outputs(output) if callable(outputs) else outputs)
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
        return spec_of(tracer, state), inputs


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
        with torch.no_grad(), plain_operations(model):
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
