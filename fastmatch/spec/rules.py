"""What each ATen operation does to the labels of its operands: one rule an operation.

A rule reads the labels of the inputs, unites what the operation makes equal, and gives the outputs theirs.
An operation without a rule pins every axis that reaches it. Names are overload packets (``aten.relu_``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fastmatch.spec.labels import Label, pin, product, split_product, split_sum, sum_of, unify

if TYPE_CHECKING:
    from fastmatch.spec.trace import Tracer

__all__ = ["ACTIVATIONS", "RULES"]

Rule: TypeAlias = "Callable[[Tracer, str, tuple[Any, ...], dict[str, Any], Any], None]"
RULES: dict[str, Rule] = {}

ACTIVATIONS = frozenset(
    [
        "relu",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "leaky_relu",
        "elu",
        "celu",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "mish",
        "softplus",
        "_prelu_kernel",
        "prelu",
        "clamp_min",
        "threshold",
        "log_sigmoid_forward",
    ]
)
"""Elementwise nonlinearities: activations are read before or after them."""

ELEMENTWISE = ACTIVATIONS | frozenset(
    [
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "abs",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "pow",
        "sin",
        "cos",
        "sign",
        "erf",
        "floor",
        "ceil",
        "round",
        "trunc",
        "clamp",
        "clamp_max",
        "maximum",
        "minimum",
        "where",
        "masked_fill",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
        "logical_not",
        "bitwise_and",
        "bitwise_or",
        "bitwise_not",
        "isnan",
        "isinf",
        "isfinite",
        "addcmul",
        "addcdiv",
        "lerp",
        "atan2",
        "fmod",
        "remainder",
        "floor_divide",
        "nan_to_num",
        "copy",
        "clone",
        "_to_copy",
        "detach",
        "alias",
        "lift_fresh",
        "contiguous",
        "to",
        "fill",
        "zero",
        "hardshrink",
        "softshrink",
        "tan",
        "atan",
        "asin",
        "acos",
        "sinh",
        "cosh",
        "relu6",
    ]
)
FACTORIES = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
    ]
)
"""Tensors alike at every position: whatever is united with them may move."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of the operations that it serves."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nest of lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return []


def fresh(shape: Sequence[int], reason: str | None = None) -> list[Label]:
    """New labels; pinned where a reason is given."""
    return [Label(n, pinned=reason if n > 1 else None) for n in shape]


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, default: int) -> int:
    return args[position] if len(args) > position else kwargs.get("dim", default)


def pin_all(tr: Tracer, name: str, inputs: Any, out: Any) -> None:
    """The fallback: everything that reaches the operation, and what comes of it, stays as it is."""
    for tensor in tensors_in(inputs):
        for label in tr.labels(tensor):
            pin(label, name)
    for tensor in tensors_in(out):
        known = tr.knows(tensor)
        for label in tr.labels(tensor) if known else []:
            pin(label, name)
        # In place, an operation may also have changed the shape.
        if not known or [label.size for label in tr.labels(tensor)] != list(tensor.shape):
            tr.set(tensor, fresh(tensor.shape, name))


def _elementwise(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    out, *others = tensors_in(out)
    out_shape = out.shape
    labels: list[Label | None] = [None] * len(out_shape)
    operands = tensors_in((args, kwargs))
    for tensor in operands:
        offset = len(out_shape) - tensor.ndim
        for dim, label in enumerate(tr.labels(tensor)):
            if label.size != out_shape[offset + dim]:
                continue  # broadcast: alike along this axis
            seen = labels[offset + dim]
            if seen is not None:
                unify(seen, label, name)
            if seen is None or label.follows is not None:
                labels[offset + dim] = label
    result = [label if label is not None else Label(n) for label, n in zip(labels, out_shape, strict=True)]
    if not tr.knows(out):
        tr.set(out, result)
    else:  # in place
        for mine, label in zip(tr.labels(out), result, strict=True):
            unify(mine, label, name)
    for tensor in others:  # saved for a backward pass; empty on some devices
        tr.set(tensor, result if tensor.shape == out_shape else fresh(tensor.shape, name))
    base = name.removeprefix("aten.").removesuffix("_")
    if base in ACTIVATIONS and isinstance(args[0], torch.Tensor) and args[0].shape == out_shape:
        tr.mark_site("activation", args[0], 0, result)


for _name in ELEMENTWISE:
    RULES[_name] = RULES[_name + "_"] = _elementwise


def _factory(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tr.set(out, fresh(out.shape))


for _name in FACTORIES:
    RULES[_name] = _factory


def _regroup(tr: Tracer, name: str, source: torch.Tensor, out: torch.Tensor) -> list[Label]:
    """Labels after a view: axes are matched in the smallest groups of equal length, each split and joined."""
    labels, sizes = tr.labels(source), list(out.shape)
    if math.prod(sizes) == 0:
        for label in labels:
            pin(label, name)
        return fresh(sizes, name)
    result: list[Label] = []
    i = j = 0
    while j < len(sizes) or i < len(labels):
        taken, given = [], []
        left = right = 1
        while True:
            if left == right and taken and given:
                break
            if (left <= right and i < len(labels)) or j >= len(sizes):
                if i >= len(labels):
                    break
                taken.append(labels[i])
                left *= labels[i].size
                i += 1
            else:
                given.append(sizes[j])
                right *= sizes[j]
                j += 1
        if len(taken) == len(given) == 1:
            result += taken
            continue
        split = split_product(taken, given)
        if split is None:
            for label in taken:
                pin(label, name)
            split = fresh(given, name)
        result += split
    return result


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tr.set(out, _regroup(tr, name, args[0], out))


@rule("unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def _singleton(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    kept = iter([label for label in tr.labels(args[0]) if label.size != 1])
    tr.set(out, [Label(1) if n == 1 else next(kept) for n in out.shape])


@rule("as_strided", "as_strided_")
def _as_strided(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    # Only other strides for axes of one position: pooling marks its results as channels-last that way.
    if [x.size for x in labels] != list(args[1]):
        raise NotImplementedError("another view of the memory")
    tr.set(out, labels)


@rule("view_as_complex", "_conj", "resolve_conj", "conj_physical")
def _complex(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    for label in labels[out.ndim :]:
        pin(label, name)  # real and imaginary part
    tr.set(out, labels[: out.ndim])


@rule("view_as_real", "_view_as_real")
def _real(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tr.set(out, [*tr.labels(args[0]), Label(2, pinned=name)])


@rule("t", "transpose", "permute", "numpy_T", "swapaxes", "t_", "transpose_", "swapaxes_")
def _permute(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    order = list(range(len(labels)))
    if name.endswith("permute"):
        order = [d % len(labels) for d in args[1]]
    elif len(args) > 1:
        first, second = (d % len(labels) for d in args[1:3])
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    tr.set(out, [labels[d] for d in order])


@rule("expand")
def _expand(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    padded = [None] * (out.ndim - len(labels)) + labels
    tr.set(
        out,
        [x if x is not None and x.size == n else Label(n) for x, n in zip(padded, out.shape, strict=True)],
    )


@rule("repeat")
def _repeat(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    padded = [Label(1)] * (out.ndim - len(labels)) + labels
    tr.set(out, [product([Label(n // x.size), x]) for x, n in zip(padded, out.shape, strict=True)])


def _cut(name: str, label: Label, sizes: Sequence[int]) -> list[Label]:
    parts = split_sum(label, sizes)
    if parts is None:
        pin(label, name)
        parts = fresh(sizes, name)
    return parts


@rule("slice")
def _slice(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    dim = (args[1] if len(args) > 1 else 0) % len(labels)
    start, end, step = (args[k] if len(args) > k else None for k in (2, 3, 4))
    length = labels[dim].size
    if step not in (None, 1):
        pin(labels[dim], name)
        labels[dim] = Label(out.shape[dim], pinned=name)
    elif out.shape[dim] != length:
        start, end, _ = slice(start, end).indices(length)
        labels[dim] = _cut(name, labels[dim], [start, max(end - start, 0), length - max(end, start)])[1]
    tr.set(out, labels)


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def _split(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = _dim(args, kwargs, 2, 0) % len(labels)
    parts = _cut(name, labels[dim], [t.shape[dim] for t in out])
    for part, label in zip(out, parts, strict=True):
        tr.set(part, [*labels[:dim], label, *labels[dim + 1 :]])


@rule("cat")
def _cat(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    parts = [t for t in args[0] if t.ndim == out.ndim]  # an empty 1-d tensor may stand among others
    dim = _dim(args, kwargs, 1, 0) % out.ndim
    labels = list(tr.labels(parts[0]))
    for part in parts[1:]:
        for d, label in enumerate(tr.labels(part)):
            if d != dim:
                unify(labels[d], label, name)
    labels[dim] = sum_of([tr.labels(part)[dim] for part in parts])
    tr.set(out, labels)


@rule("stack")
def _stack(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = _dim(args, kwargs, 1, 0) % out.ndim
    labels = list(tr.labels(args[0][0]))
    for part in args[0][1:]:
        for mine, label in zip(labels, tr.labels(part), strict=True):
            unify(mine, label, name)
    labels.insert(dim, Label(out.shape[dim], pinned=name))
    tr.set(out, labels)


@rule("constant_pad_nd")
def _pad(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    amounts = args[1]
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k : 2 * k + 2]
        dim = out.ndim - 1 - k
        if before < 0 or after < 0:
            pin(labels[dim], name)
            labels[dim] = Label(out.shape[dim], pinned=name)
        elif before or after:
            labels[dim] = sum_of([Label(before, pinned=name), labels[dim], Label(after, pinned=name)])
    tr.set(out, labels)


def _contract(
    tr: Tracer, name: str, left: torch.Tensor, right: torch.Tensor, positions: tuple[int, int], out: Any
) -> list[Label]:
    """Labels of ``left @ right``; batch dimensions are united, the contracted ones too."""
    a, b = tr.labels(left), tr.labels(right)
    unify(a[-1], b[-2], name)
    batch = a[:-2]
    for x, y in zip(batch, b[:-2], strict=True):
        unify(x, y, name)
    batch = [y if y.follows is not None else x for x, y in zip(batch, b[:-2], strict=True)]
    tr.contract(a[-1], batch)
    tr.contract(b[-2], batch)
    labels = [*batch, a[-2], b[-1]]
    if tr.is_data(left) and not tr.is_data(right):
        tr.mark_contracted(b[-2])
        tr.mark_site("consumed", left, positions[0], a, dims=(left.ndim - 1,))
        tr.mark_site("produced", out, -1, labels, dims=(len(labels) - 1,))
    elif tr.is_data(right) and not tr.is_data(left):
        tr.mark_contracted(a[-1])
        tr.mark_site("consumed", right, positions[1], b, dims=(right.ndim - 2,))
        tr.mark_site("produced", out, -1, labels, dims=(len(labels) - 2,))
    return labels


@rule("mm", "bmm", "matmul")
def _mm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tr.set(out, _contract(tr, name, args[0], args[1], (0, 1), out))


@rule("mv", "dot")
def _mv(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    a, b = tr.labels(args[0]), tr.labels(args[1])
    unify(a[-1], b[0], name)
    tr.contract(a[-1])
    tr.set(out, a[:-1])


@rule("addmm", "baddbmm")
def _addmm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = _contract(tr, name, args[1], args[2], (1, 2), out)
    _add_broadcast(tr, name, args[0], labels)
    tr.set(out, labels)


def _add_broadcast(tr: Tracer, name: str, tensor: torch.Tensor, labels: list[Label]) -> None:
    for mine, label in zip(reversed(labels), reversed(tr.labels(tensor)), strict=False):
        if label.size == mine.size:
            unify(mine, label, name)


@rule("linear")
def _linear(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    data: torch.Tensor = args[0]
    inputs, weight = tr.labels(data), tr.labels(args[1])
    unify(inputs[-1], weight[1], name)
    labels = [*inputs[:-1], weight[0]]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if bias is not None:
        unify(weight[0], tr.labels(bias)[0], name)
    tr.contract(inputs[-1])
    tr.mark_contracted(weight[1])
    tr.mark_site("consumed", data, 0, inputs, dims=(len(inputs) - 1,))
    tr.mark_site("produced", out, -1, labels, dims=(len(labels) - 1,))
    tr.set(out, labels)


@rule("convolution")
def _convolution(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    data, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    x, w = tr.labels(data), tr.labels(weight)
    lead = data.ndim - weight.ndim + 1  # 1 with a batch dimension, 0 without
    for label in [*x[lead + 1 :], *w[2:]]:
        pin(label, f"{name} (spatial)")
    # A transposed kernel is (in, out / groups, ...); a plain one (out, in / groups, ...).
    if transposed:
        inner_in = split_product([w[0]], [groups, weight.shape[0] // groups])
        outer, per_group = None, w[1]
    else:
        inner_in = None
        outer, per_group = w[0], w[1]
    channels = split_product([x[lead]], [groups, x[lead].size // groups])
    if transposed:
        if channels is None or inner_in is None:
            pin_all(tr, name, args, out)
            return
        for mine, label in zip(channels, inner_in, strict=True):
            unify(mine, label, name)
        result = product([channels[0], per_group])
    else:
        assert outer is not None
        filters = split_product([outer], [groups, outer.size // groups])
        if channels is None or filters is None:
            pin_all(tr, name, args, out)
            return
        unify(channels[0], filters[0], name)
        unify(channels[1], per_group, name)
        tr.contract(per_group, [filters[0]])
        result = outer
    tr.contract(x[lead])
    if bias is not None:
        unify(result, tr.labels(bias)[0], name)
    spatial = fresh(out.shape[lead + 1 :], f"{name} (spatial)")
    labels = [*x[:lead], result, *spatial]
    tr.mark_contracted(w[0] if transposed else w[1])
    tr.mark_site("consumed", data, 0, x, dims=(lead,))
    tr.mark_site("produced", out, -1, labels, dims=(lead,))
    tr.set(out, labels)


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "miopen_batch_norm", "batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
)  # fmt: skip
def _batch_norm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    channel = labels[1] if len(labels) > 1 else labels[0]
    for tensor in args[1:5]:
        if isinstance(tensor, torch.Tensor):
            unify(channel, tr.labels(tensor)[0], name)
    first, *others = tensors_in(out)
    tr.set(first, labels)
    for tensor in others:
        matches = tensor.ndim == 1 and tensor.shape[0] == channel.size
        tr.set(tensor, [channel] if matches else fresh(tensor.shape, name))


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    count = len(args[1])
    tr.mixed(labels, set(range(len(labels) - count, len(labels))))
    for tensor in args[2:4]:
        if isinstance(tensor, torch.Tensor):
            for mine, label in zip(labels[-count:], tr.labels(tensor), strict=True):
                unify(mine, label, name)
    first, *others = tensors_in(out)
    tr.set(first, labels)
    for tensor in others:
        tr.set(tensor, [x if x.size == n else Label(n) for x, n in zip(labels, tensor.shape, strict=True)])


@rule("native_group_norm")
def _group_norm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    groups = args[6]
    for tensor in args[1:3]:
        if isinstance(tensor, torch.Tensor):
            unify(labels[1], tr.labels(tensor)[0], name)
    split = split_product([labels[1]], [groups, labels[1].size // groups])
    if split is None:
        pin(labels[1], name)
        split = fresh((groups, labels[1].size // groups), name)
    tr.contract(split[0])
    first, *others = tensors_in(out)
    tr.set(first, labels)
    for tensor in others:
        tr.set(tensor, [labels[0], split[0]])


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def _softmax(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    dim = _dim(args, kwargs, 1, -1) % max(len(labels), 1)
    tr.mixed(labels, {dim})
    tr.set(out, labels)  # symmetric along its axis


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention",
)  # fmt: skip
def _attention(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    query, key, value = (tr.labels(t) for t in args[:3])
    lead = len(query) - 3
    for d in range(lead):
        unify(query[d], key[d], name)
    for d in range(lead + 1):
        unify(key[d], value[d], name)
    # Several query heads may share a key head: they lie next to each other.
    shared = [key[lead].size, query[lead].size // key[lead].size]
    split = split_product([query[lead]], shared)
    if split is None:
        pin(query[lead], name)
        pin(key[lead], name)
    else:
        unify(split[0], key[lead], name)
    unify(query[-1], key[-1], name)
    unify(key[-2], value[-2], name)
    tr.contract(query[-1], query[: lead + 1])
    tr.contract(key[-1], key[: lead + 1])
    tr.contract(key[-2], key[: lead + 1])
    causal = kwargs.get("is_causal", args[4] if len(args) > 4 and isinstance(args[4], bool) else False)
    if causal or any(arg is True for arg in args[3:]):
        pin(query[-2], name)
        pin(key[-2], name)
    masks = [t for t in tensors_in((args[3:], kwargs)) if t.ndim >= 2]
    scores = [*query[:-1], key[-2]]
    for mask in masks:
        _add_broadcast(tr, name, mask, scores)
    first, *others = tensors_in(out)
    tr.set(first, [*query[:-1], value[-1]])
    for tensor in others:
        tr.set(tensor, fresh(tensor.shape, name))


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    direction, magnitude, *dims = args
    labels = tr.labels(direction)
    dim = (dims[0] if dims else kwargs.get("dim", 0)) % len(labels)
    _add_broadcast(tr, name, magnitude, labels)
    for tensor in tensors_in(out):
        tr.set(tensor, [x if x.size == n else Label(n) for x, n in zip(labels, tensor.shape, strict=True)])
    tr.contract(labels[dim])


@rule(
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "std",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "prod",
    "any",
    "all",
)
def _reduce(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    if out.ndim == 0:
        tr.set(out, [])
        return
    position = 2 if name.endswith(("linalg_vector_norm", "aten.norm")) else 1
    dims = args[position] if len(args) > position else kwargs.get("dim")
    dims = range(len(labels)) if dims is None else ([dims] if isinstance(dims, int) else dims)
    reduced = {d % len(labels) for d in dims} or set(range(len(labels)))
    kept = [Label(1) if d in reduced else label for d, label in enumerate(labels)]
    tr.set(out, kept if out.ndim == len(labels) else [x for d, x in enumerate(kept) if d not in reduced])


@rule(
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "adaptive_avg_pool1d", "max_pool1d", "max_pool2d", "max_pool3d", "reflection_pad1d",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "mkldnn_max_pool2d", "quantized_max_pool2d",
)  # fmt: skip
def _spatial(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = tr.labels(args[0])
    digit = next((c for c in name if c in "123"), "2")
    lead = len(labels) - int(digit)
    for label in labels[lead:]:
        pin(label, f"{name} (spatial)")
    for tensor in tensors_in(out):
        tr.set(tensor, [*labels[:lead], *fresh(tensor.shape[lead:], f"{name} (spatial)")])


@rule("glu")
def _glu(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = list(tr.labels(args[0]))
    dim = _dim(args, kwargs, 1, -1) % len(labels)
    first, second = _cut(name, labels[dim], [out.shape[dim]] * 2)
    unify(first, second, name)
    labels[dim] = first
    tr.set(out, labels)


@rule("embedding")
def _embedding(tr: Tracer, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    weight, indices = tr.labels(args[0]), tr.labels(args[1])
    pin(weight[0], f"{name} (vocabulary)")
    labels = [*indices, *weight[1:]]
    tr.mark_site("produced", out, -1, labels, dims=(len(labels) - 1,))
    tr.set(out, labels)
