"""Merge coefficients: checks, and a note of them on a merged module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastmatch._internal.callers import warn_user
from fastmatch._internal.checks import check_weights
from fastmatch._internal.divided import local_part

__all__ = [
    "check_merged_from",
    "check_weights",
    "has_stale_note",
    "is_one",
    "remember_weights",
    "remembered_weights",
    "warn_of_scale",
]

_NOTE = "fastmatch_merge_weights"
_ENTRIES = 256
"""Of every parameter that a note keeps, to tell whether the module still holds what was merged."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_one(total: float) -> bool:
    """Whether a sum of weights counts as one."""
    return abs(total - 1) <= 1e-6


def warn_of_scale(weights: Sequence[float], call: str = "merge", scaled: str = "every tensor") -> None:
    """Warn of weights of a merge that do not sum to one."""
    total = sum(weights)
    if not is_one(total):
        warn_user(f"{call}: weights sum to {total:g}, not one: {scaled} is scaled by that")


@dataclass(frozen=True)
class _Note:
    """The weights of a merge, and of the tensors that it made, by parameter: entries, the dtype and a sum over all bits."""

    weights: tuple[float, ...]
    entries: dict[str, torch.Tensor]
    dtypes: dict[str, torch.dtype]
    sums: dict[str, torch.Tensor]


def remember_weights(model: nn.Module, weights: Sequence[float]) -> nn.Module:
    """Note on a merged module the weights it was made with, for a later renormalization.

    Copies keep the note. It holds for the tensors that the module has now, on any device. In their own dtype not one bit may
    change; after a cast, entries may differ by rounding.
    """
    parameters = _floating(model)
    entries = {name: _entries(tensor) for name, tensor in parameters.items()}
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    sums = {name: _sum_of_bits(tensor) for name, tensor in parameters.items()}
    model.__dict__[_NOTE] = _Note(tuple(float(w) for w in weights), entries, dtypes, sums)
    return model


def remembered_weights(
    model: nn.Module, endpoints: Sequence[nn.Module] | None = None
) -> tuple[float, ...] | None:
    """Return the weights that a module was merged with; None if there is no note, or other tensors were loaded since.

    Raises:
        ValueError: the module is not the sum of ``endpoints`` by these weights, as far as entries of matrices tell.
    """
    note = model.__dict__.get(_NOTE)
    if not isinstance(note, _Note):
        return None
    changed = _changed(model, note)
    if changed is None:
        return None
    others = {} if endpoints is None else _not_merged(model, endpoints, note.weights, [note.dtypes])
    found = int(_any(changed) * 2 + _any(list(others.values())))  # a GPU is waited for once
    if found >= 2:
        return None
    if found:
        names = [f"endpoints[{k}]" for k in range(len(note.weights))]
        told = _told_not_merged(others, names, note.weights)
        raise ValueError(f"endpoints: {told}. Give the aligned models, or weights= if this is meant")
    return note.weights


def has_stale_note(model: nn.Module) -> bool:
    """Return whether a module was merged, and has other tensors now."""
    return isinstance(model.__dict__.get(_NOTE), _Note) and remembered_weights(model) is None


def check_merged_from(
    model: nn.Module,
    endpoints: Sequence[nn.Module],
    names: Sequence[str],
    weights: Sequence[float],
    dtypes: Sequence[Mapping[str, torch.dtype]],
) -> None:
    """Check that a module without a note is the sum of ``endpoints`` by ``weights``, as far as entries of matrices tell.

    Args:
        model: the merge.
        endpoints: that it was merged of, and their ``names`` for the error.
        names, weights: one per endpoint.
        dtypes: in which the modules' tensors were stored, by parameter: sums are rounded to these.

    Raises:
        ValueError: it is not; a tensor is named.
    """
    others = _not_merged(model, endpoints, weights, dtypes)
    if bool(_any(list(others.values()))):
        raise ValueError(_told_not_merged(others, names, weights))


def _told_not_merged(
    others: Mapping[str, torch.Tensor], names: Sequence[str], weights: Sequence[float]
) -> str:
    wrong = next(name for name, is_other in others.items() if bool(is_other))
    terms = " + ".join(f"{w:g} {name}" for w, name in zip(weights, names, strict=True))
    return f"expected the models that were merged, in their order; the merge's {wrong!r} is not {terms}"


def _any(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return 0 or 1, on the device of the first flag."""
    if not flags:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any().long()


def _changed(model: nn.Module, note: _Note) -> list[torch.Tensor] | None:
    """Return for every parameter whether it is another one than was merged; None if there are other parameters."""
    parameters = _floating(model)
    if parameters.keys() != note.entries.keys():
        return None
    found = []
    for name, tensor in parameters.items():
        if tensor.dtype == note.dtypes[name]:
            found.append((_sum_of_bits(tensor) != note.sums[name].to(tensor.device)).any())
            continue
        now = _entries(tensor)
        then = note.entries[name].to(now.device)
        if then.shape != now.shape:
            return None
        if now.numel():
            eps = 2 * max(torch.finfo(dtype).eps for dtype in (note.dtypes[name], tensor.dtype))
            close = (now - then).abs() <= eps * (then.abs() + then.abs().max())
            found.append(~(close | (now == then)).all())
    return found


def _not_merged(
    model: nn.Module,
    endpoints: Sequence[nn.Module],
    weights: Sequence[float],
    stored: Sequence[Mapping[str, torch.dtype]],
) -> dict[str, torch.Tensor]:
    """Return for every matrix whether it is not the weighted sum of those of ``endpoints``, by some of its entries.

    Vectors are left out: a merge may have corrected biases. So are modules of other parameters.
    """
    found: dict[str, torch.Tensor] = {}
    if not all(isinstance(x, nn.Module) for x in endpoints):
        return found  # told of where endpoints are checked
    merged, *ends = (_floating(x) for x in (model, *endpoints))
    if len(ends) != len(weights) or any(end.keys() != merged.keys() for end in ends):
        return found
    for name, tensor in merged.items():
        if tensor.ndim < 2 or not tensor.numel() or any(end[name].shape != tensor.shape for end in ends):
            continue
        now = _entries(tensor)
        terms = torch.stack(
            [w * _entries(e[name]).to(now.device) for w, e in zip(weights, ends, strict=True)]
        )
        dtypes = {tensor.dtype, *(end[name].dtype for end in ends)}
        dtypes |= {table[name] for table in stored if name in table}
        allowed = 8 * max(torch.finfo(dtype).eps for dtype in dtypes) * terms.abs().amax(1).sum()
        found[name] = (terms.sum(0) - now).abs().max() > allowed
    return found


def _floating(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters, of divided ones this rank's part; running statistics are buffers, which change while a model is calibrated or trained."""
    found = {name: local_part(p).detach() for name, p in model.named_parameters() if not p.is_meta}
    return {name: t for name, t in found.items() if t.is_floating_point() or t.is_complex()}


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a checksum of all entries, equal on every device: sums of their bits, of which half are weighted by place."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.itemsize])
    odd = bits[1::2].sum(dtype=torch.int64)
    return torch.stack([bits.sum(dtype=torch.int64), odd])


def _entries(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to :data:`_ENTRIES` entries of a tensor, evenly spaced over its flat order, in float64 on its device."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    chosen = tensor.reshape(-1)[:: max(1, -(-tensor.numel() // _ENTRIES))]
    chosen = chosen.cpu() if chosen.device.type == "mps" else chosen  # Apple's GPUs have no float64
    return chosen.to(torch.float64, copy=True)
