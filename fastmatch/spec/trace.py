"""Tracing: the ATen operations of one forward pass, with a label for every axis.

The model runs once on a small example under a dispatch mode. The rule of each operation
(:mod:`fastmatch.spec.rules`) unites the labels of axes that it makes equal. At the end, every label that is
not pinned and is on a parameter becomes a permutation group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._ops import HigherOrderOperator

from fastmatch._internal.callers import warn_user
from fastmatch._internal.dispatch_mode import DispatchMode
from fastmatch._internal.divided import undivided
from fastmatch._internal.states import check_module
from fastmatch._internal.words import error_line
from fastmatch.spec.branches import Siblings, training
from fastmatch.spec.choices import ARGUMENT, Choices
from fastmatch.spec.escapes import Escapes
from fastmatch.spec.follow import follow_others
from fastmatch.spec.grouping import Found, find_groups
from fastmatch.spec.hollow import filled
from fastmatch.spec.labels import Label, is_pinned, pin, unify
from fastmatch.spec.operations import Call, bind, counts, is_composite, op_name, tensors_in
from fastmatch.spec.origins import COPIES, follow_origins, follow_ties
from fastmatch.spec.record import RawSite, Record, ValuesNeeded, fresh, storage_id
from fastmatch.spec.rules import rule_of
from fastmatch.spec.rules.elementwise import FACTORIES, exchangeable
from fastmatch.spec.rules.indexing import follow_positions
from fastmatch.spec.rules.registry import pin_all
from fastmatch.spec.running import (
    Outputs,
    check_not_batches,
    copies_of,
    examples_of,
    outputs_named,
    untouched,
)
from fastmatch.spec.selections import with_selections
from fastmatch.spec.spots import Spots
from fastmatch.spec.uncomputed import Uncomputed, can_omit, structure_of
from fastmatch.spec.unread import pin_unread

__all__ = ["Tracer", "trace"]

Compute: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Returns what an operation returns for positional and keyword arguments."""


class Tracer(DispatchMode):
    """Carries labels along the operations that run inside it.

    Attributes:
        record: the labels, and what rules have noted.
        compute: runs an operation and returns its result.
        spots: what each operation belongs to.
        choices: the numbers that the model reads in Python.
    """

    supports_higher_order_operators = True  # they reach the mode, which refuses them by name

    def __init__(
        self,
        compute: Compute | None = None,
        record: Record | None = None,
        spots: Spots | None = None,
        choices: Choices | None = None,
    ) -> None:
        super().__init__()
        self.record = record or Record()
        self.compute = compute or partial(_computed, set())
        self.spots = spots or Spots(nn.Module())
        self.choices = choices or Choices()
        self.number = -1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise ValueError(
                f"model: calls torch's {func.name()!r}, which runs functions that a trace does not see; branch in Python instead"
            )
        if is_composite(func):
            with (
                self
            ):  # as torch does before a mode sees an operation, but not for tensors made in inference mode
                return func.decompose(*args, **kwargs)
        spot = self.spots.at(op_name(func), args, kwargs)
        self.choices.before(self.record, func, args, kwargs)
        selecting = partial(self.choices.told_selection, module=spot.module)
        out = self.compute(func, with_selections(op_name(func), args, self._depends, selecting), kwargs)
        _check_dense(tensors_in(out), "model: computes")
        self.choices.after(out)
        if isinstance(out, (bool, int, float)) and any(map(self._depends, tensors_in((args, kwargs)))):
            out = self.choices.told(out, spot.module)
        self.number += counts(func)
        self.spots.after(out, is_view=func.is_view)
        call = Call(self.number, op_name(func), bind(func, args, kwargs), out, spot)
        # The tensors given as out= may have other views, so their old labels are constraints as well.
        written = [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        earlier = [(t, self.record.labels(t)) for t in written if self.record.knows(t)]
        follow_origins(self.record, call)
        follow_positions(self.record, call)
        if not (func.is_view or call.base in COPIES or call.base in FACTORIES):
            for tensor in call.inputs:
                self.record.mark_read(tensor)
        among = self._samples(func, call)
        self._apply_rule(func, call)
        for tensor, before in earlier:
            self._unite_written(call.name, tensor, before)
        for tensor in call.outputs:
            if not self.record.knows(tensor):
                self._label_constant(func, call, tensor)
        self._note_counts(func, call, among)
        follow_ties(self.record, call)
        return out

    def _depends(self, tensor: torch.Tensor) -> bool:
        return self.record.is_data(tensor) or self.record.is_state(tensor)

    def _apply_rule(self, func: Any, call: Call) -> None:
        rule = rule_of(func)
        if rule is None and self.record.exchangeable and torch.Tag.nondeterministic_seeded in func.tags:
            rule = exchangeable
        if rule is None:
            if call.inputs:
                pin_all(self.record, call, call.name)
            return
        try:
            rule(self.record, call)
        except Exception as error:
            # The rule was not written for this form of the operation: as safe as having no rule.
            pin_all(self.record, call, f"{call.name} (its rule failed: {type(error).__name__})")

    def _label_constant(self, func: Any, call: Call, tensor: torch.Tensor) -> None:
        """Label a tensor that has no inputs; random numbers that happen to be equal here are not equal elsewhere."""
        if torch.Tag.nondeterministic_seeded in func.tags and not self.record.exchangeable:
            self.record.set(tensor, fresh(tensor.shape, call.name))
        else:
            self.record.labels(tensor)

    def _samples(self, func: Any, call: Call) -> dict[int, list[Label]]:
        """Return the axes of the operands, by number, that stay in place before an operation selects among them and pins all."""
        if torch.Tag.dynamic_output_shape not in func.tags or call.base == "index":
            return {}
        axes = {k: self.record.labels(tensor) for k, tensor in enumerate(call.inputs)}
        return {k: labels for k, labels in axes.items() if all(map(is_pinned, labels))}

    def _note_counts(self, func: Any, call: Call, among: dict[int, list[Label]]) -> None:
        """Note axes whose length depends on values; the rule of index tells which are those of a mask."""
        if torch.Tag.dynamic_output_shape in func.tags and call.base != "index":
            selected = call.outputs[:1]  # unique returns more, which have the rows of the operand
            for label in (label for tensor in selected for label in self.record.labels(tensor)):
                for k, labels in among.items():
                    self.record.mark_chosen(label, labels, call.inputs[k])
            for label in (label for tensor in call.outputs for label in self.record.labels(tensor)):
                if is_pinned(label):
                    self.record.mark_counted(label)

    def _unite_written(self, name: str, tensor: torch.Tensor, before: list[Label]) -> None:
        """Unite the labels that a tensor had before it was written to with those of the result."""
        same_shape = [label.size for label in before] == list(tensor.shape)
        for old, new in zip(before, self.record.labels(tensor), strict=False):
            if same_shape:
                unify(old, new, name)
            else:
                pin(old, name)
                pin(new, name)


def _told_numbers(value: Any, choices: Choices, path: str = ARGUMENT) -> Any:
    """Return a model's arguments with the numbers that it is told: they may say where it cuts or which path it takes.

    Flags are left as they are: others mostly ask for more outputs, whose axes would stay in place.
    """
    if type(value) in (int, float):
        return choices.told(value, path)
    if isinstance(value, dict):
        return {key: _told_numbers(part, choices, f"{path}.{key}") for key, part in value.items()}
    if type(value) not in (list, tuple):
        return value
    if value and all(type(part) is int for part in value):
        return type(value)(choices.told(list(value), path))
    return type(value)(_told_numbers(part, choices, f"{path}.{k}") for k, part in enumerate(value))


def _check_dense(tensors: Iterable[torch.Tensor], where: str) -> None:
    """Raise ValueError for sparse and nested tensors: which memory they share, and what is where in it, is not known."""
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{where} a {kind} tensor, which a trace does not follow; expected dense ones")


def _computed(hollow: set[int], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation; those on hollow parameters, by their memories, may only look as if they did."""
    out = _hollow_result(op_name(func), args, hollow) if hollow else None
    return func(*args, **kwargs) if out is None else out


def _hollow_result(name: str, args: tuple[Any, ...], hollow: set[int]) -> torch.Tensor | None:
    """Return a result of the right shape without computing it, if an operand is hollow; None to compute it.

    Computing would copy the parameter at its full size. A product becomes zeros, and an index becomes another
    overlapping view: labels come from the operations, not from the numbers.
    """
    operands = [t for t in args if isinstance(t, torch.Tensor)]
    if not any(storage_id(t) in hollow for t in operands):
        return None
    if name in ("aten.mm", "aten.bmm"):
        left, right = args[:2]
        return left.new_zeros(*left.shape[:-1], right.shape[-1])
    if name == "aten.addmm":
        _, left, right = args[:3]
        return left.new_zeros(left.shape[0], right.shape[1])
    if name == "aten.index" and len(args[1]) == 1 and args[1][0] is not None:
        data, (index,) = args[:2]
        if not index.dtype.is_floating_point and index.dtype != torch.bool:
            shape = (*index.shape, *data.shape[1:])
            return data.as_strided(shape, (0,) * index.ndim + tuple(data.stride()[1:]))
    return None


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    run: Callable[..., Any] | None = None,
    outputs: Outputs = None,
) -> Found:
    """Find the permutation groups of ``model``; see :meth:`fastmatch.spec.PermutationSpec.trace`.

    ``run(tracer, *args, **kwargs)`` runs the model if a plain call is not enough. A model on the meta device is traced
    without its weights.
    """
    check_module(model, "model")
    model = undivided(model)
    examples = examples_of(example_inputs, kwargs)
    with filled(model):
        if run is None and can_omit(model, tensors_in(examples)):
            # A trace without values is that with them, or none: then the error is that of a usual pass, if it has one.
            with suppress(Exception, ValuesNeeded):
                return _trace(structure_of(model), examples, run, outputs, computes=False)
        try:
            return _trace(model, examples, run, outputs)
        except Exception as error:
            check_not_batches(example_inputs, error)
            raise


def _instead_of_tensors(args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """Return what was given where tensors are wanted, and how an array becomes one."""
    given = [*args, *keywords.values()]
    if not given:
        return ""
    told = f" but {', '.join(type(value).__name__ for value in given)}"
    is_array = any(type(value).__module__ == "numpy" for value in given)
    return told + ("; torch.from_numpy(x) makes one of an array" if is_array else "")


def _trace(
    model: nn.Module,
    examples: list[tuple[tuple[Any, ...], dict[str, Any]]],
    run: Callable[..., Any] | None,
    outputs: Outputs,
    *,
    computes: bool = True,
) -> Found:
    state: dict[str, torch.Tensor] = {
        name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)
    }
    if not state:
        raise ValueError("model: has no parameters or buffers to permute")
    for args, keywords in examples:
        if not tensors_in((args, keywords)):
            raise ValueError(
                "example_inputs: expected what the model takes, a batch of 2 is enough; got no tensor"
                f"{_instead_of_tensors(args, keywords)}"
            )
    _check_dense(state.values(), "model: has")
    _check_dense(tensors_in(examples), "example_inputs: have")
    hollow = {storage_id(t) for t in state.values() if t.untyped_storage().nbytes() < t.nbytes}
    record = Record(real_values=not hollow)
    _label_state(record, state)
    compute = partial(_computed, hollow)
    if not computes:
        record.uncomputed |= {storage_id(p) for p in model.parameters()} | hollow
        compute = Uncomputed(record).run
    sites: list[RawSite] = []

    def passed(
        args: tuple[Any, ...], keywords: dict[str, Any], choices: Choices, model: nn.Module = model
    ) -> None:
        spots = Spots(model)
        record.begin_pass()
        tracer, siblings = Tracer(compute, record, spots, choices), Siblings(model)
        args, keywords = _told_numbers(copies_of((args, keywords)), choices)
        for tensor in tensors_in((args, keywords)):
            if not record.knows(tensor):
                record.set(tensor, fresh(tensor.shape, "model input"))
            record.mark_input(tensor)
            record.mark_data(tensor)
        with Escapes(record, choices, spots), tracer:
            with siblings.watched(), spots.watched():
                output = run(tracer, *args, **keywords) if run else model(*args, **keywords)
            if spots.elsewhere:
                raise ValueError(
                    f"model: runs {spots.elsewhere[0]!r} on another thread, where its operations cannot be traced"
                )
            # Sites are ordered by the operations of one pass: those of the first example are kept.
            sites.extend(record.sites if not sites else ())
            siblings.call_others(record)
        returned = outputs_named(output, outputs(output) if callable(outputs) else outputs)
        if not returned:
            raise ValueError(
                f"model: returned {type(output).__name__} with no tensor in it; expected outputs to compare"
            )
        _pin_returned(record, returned)

    def passed_otherwise(args: tuple[Any, ...], keywords: dict[str, Any], choices: Choices) -> None:
        uncut, read = record.uncut(state), record.reads()
        try:
            # What a model keeps of a pass with other answers is thrown away.
            passed(args, keywords, choices, structure_of(model))
        except BaseException:
            record.forget_reads(read)
            raise
        finally:
            if choices.may_count():
                record.mark_cut_elsewhere(uncut)

    with untouched(model):
        for args, keywords in examples:
            choices = Choices()
            passed(args, keywords, choices)
            if run is None and _can_follow(model, choices):  # a graph has no other paths
                follow_others(
                    choices,
                    partial(passed_otherwise, args, keywords),
                    lambda: len(record.unread_tensors(state)),
                )
        training(model, state, record, lambda: passed(*examples[0], Choices()))
        record.sites = sites
        record.pin_beside_counted()
        unread = pin_unread(record, state)
        return find_groups(record, state, unread)


def _can_follow(model: nn.Module, choices: Choices) -> bool:
    """Whether a model that reads numbers in Python can be copied, so that other paths are followed; else a warning."""
    if not choices.made:
        return False
    try:
        structure_of(model)
    except Exception as error:
        if all(isinstance(x.value, str) or x.place[0].startswith(ARGUMENT) for x in choices.made):
            return False  # no path is known to depend on lengths and arguments
        warn_user(
            "model: it reads numbers in Python, and the paths that others lead to were not followed, because it cannot be "
            f"copied ({error_line(error)})"
        )
        return False
    return True


def _pin_returned(record: Record, returned: list[torch.Tensor]) -> None:
    """Pin the axes of the outputs, and what outputs that are positions point along."""
    for tensor in returned:
        record.mark_read(tensor)
        record.pin_positions(tensor, "model output")
        for label in record.labels(tensor):
            pin(label, "model output")


def _label_state(record: Record, state: Mapping[str, torch.Tensor]) -> None:
    """Label every dimension of the parameters and buffers; equal views of the same memory share labels."""
    views: dict[tuple[Any, ...], list[Label]] = {}
    memory: dict[int, list[tuple[Any, ...]]] = {}
    for tensor in state.values():
        if record.knows(tensor):
            continue
        view = (storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view not in views:
            views[view] = fresh(tensor.shape)
            if tensor.numel():
                memory.setdefault(view[0], []).append(view)
        record.set(tensor, views[view])
        record.mark_state(tensor)
        if isinstance(tensor, nn.Parameter):
            record.mark_learned(tensor)
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
    """Return the first byte of a view and the byte after its last."""
    _, offset, shape, stride, dtype = view
    size = dtype.itemsize
    return offset * size, (offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1) * size
