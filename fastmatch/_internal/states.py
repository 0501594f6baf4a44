"""State dicts of models, and the checks that come before any work on them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastmatch._internal.checks import nearest
from fastmatch._internal.divided import check_in_parts, check_undivided, local_part

__all__ = [
    "State", "check_finite", "check_models", "check_module", "check_same_architecture", "check_same_names", "device_of",
    "headers_of", "prefix_before", "prefix_of", "state_of", "under_prefix", "working_dtype",
]  # fmt: skip

State: TypeAlias = Mapping[str, torch.Tensor]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums of tensors of a type are computed: float32 or wider."""
    # torch promotes no type of eight bits.
    is_small = dtype.is_floating_point and dtype.itemsize == 1
    return torch.float32 if is_small else torch.promote_types(dtype, torch.float32)


def check_models(argument: str, models: object, least: int = 1) -> None:
    """Raise unless ``models`` is a sequence of at least ``least`` models: ``f(a, b)`` in place of ``f([a, b])`` is common."""
    if not isinstance(models, (Sequence, nn.ModuleList)):
        raise TypeError(f"{argument}: expected a list of models, such as [a, b]; got {type(models).__name__}")
    if len(models) < least:
        raise ValueError(f"{argument}: expected at least {('one', 'two')[least - 1]}, got {len(models)}")


def check_module(model: object, argument: str) -> None:
    """Raise TypeError unless ``model`` is a torch module that runs in Python.

    Raises:
        ValueError: it is lazy, and its first run has not given its parameters their shapes yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected a torch module, got {type(model).__name__}")
    check_in_parts(model, argument)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"its submodule {name!r}" if name else "it"
            raise TypeError(
                f"{argument}: {where} is a TorchScript module, of which no copy with other weights can be made; "
                "give the module that it was compiled from"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"{argument}: {name!r} has no shape yet, because its module is lazy; run the model once"
            )


def state_of(
    model: nn.Module | State, argument: str, *, may_be_divided: bool = False
) -> dict[str, torch.Tensor]:
    """Return the named tensors of a model or state dict, detached; they share its memory.

    Raises:
        TypeError: ``model`` is neither, an entry is not a tensor, or one is divided among ranks and may not be.
        ValueError: there are no tensors.
    """
    if isinstance(model, nn.Module):
        check_module(model, argument)
        items = model.state_dict(keep_vars=False)
    elif isinstance(model, Mapping):
        items = model
    else:
        raise TypeError(f"{argument}: expected a torch module or a state dict, got {type(model).__name__}")
    state = {}
    for name, tensor in items.items():
        if isinstance(tensor, torch.Tensor):
            state[name] = tensor.detach()
        elif not name.endswith("_extra_state"):
            raise TypeError(f"{argument}: entry {name!r} is {type(tensor).__name__}, expected a tensor")
    if not state:
        raise ValueError(f"{argument}: has no parameters or buffers")
    if not may_be_divided:
        check_undivided(state, argument)
    return state


def headers_of(state: State) -> State:
    """Return a mapping from which shapes and dtypes can be read; a state on disk has ``headers`` without values."""
    return getattr(state, "headers", state)


def device_of(state: State, name: str) -> str:
    """Return the type of the device that a tensor is on; a state on disk has ``device``, which its tensors are moved to.

    A header on the meta device does not know: without ``device``, the tensor is read.
    """
    device = getattr(state, "device", None)
    if device is None:
        header = headers_of(state)[name]
        device = (state[name] if header.is_meta else header).device
    return device.type


ORIGINS = {
    "module.": "as DistributedDataParallel and DataParallel add it; give the wrapped model (model.module)",
    "_orig_mod.": "as torch.compile adds it; give the module that was compiled (model._orig_mod)",
    "model.": "as Lightning modules and other wrappers add it; give the wrapped model",
}
"""Common prefixes of the names in a wrapped model: who adds them, and what to give instead."""


def prefix_of(names: Iterable[str], held: Collection[str]) -> str:
    """Return the prefix under which all of ``names`` are in ``held``, such as ``"model."``; empty if there is none."""
    wanted = list(names)
    if not wanted or wanted[0] in held:
        return ""
    candidates = [name.removesuffix(wanted[0]) for name in held if name.endswith("." + wanted[0])]
    return next((p for p in candidates if all(p + name in held for name in wanted)), "")


def prefix_before(names: Collection[str], held: Collection[str]) -> str:
    """Return the prefix that all of ``held`` have before names of the other; empty if there is none, or both share a name.

    One of the two may lack some of the other's names, as of tied tensors.
    """
    first, others = next(iter(held), ""), set(names)
    if not others.isdisjoint(held):
        return ""
    for prefix in (first[: k + 1] for k, letter in enumerate(first) if letter == "."):
        rest = {name.removeprefix(prefix) for name in held}
        if all(name.startswith(prefix) for name in held) and (rest <= others or rest >= others > set()):
            return prefix
    return ""


def under_prefix(prefix: str, held: Collection[str], where: str) -> str:
    """Return what an error says about names that another model has without a prefix.

    Args:
        where: the name of the model in errors; for a file or folder, its path.
    """
    origin = ORIGINS.get(prefix, "as modules that hold a model add it; give the model that they hold")
    others = [name for name in held if not name.startswith(prefix)]
    besides = f" (besides {others[0]!r}{_others(others)})" if others else ""
    start = f"has the names of the other with the prefix {prefix!r}{besides}, "
    if (Path(where) / "config.json").is_file():
        code = f"from transformers import AutoModel; AutoModel.from_pretrained({json.dumps(where)}).save_pretrained"
        code += f"({json.dumps(f'{where}_base')})"
        return f"{start}as a model with a head has it; this writes the one without: python -c {shlex.quote(code)}"
    if Path(where).exists():
        out = Path(where).with_name(f"{Path(where).stem}_plain.pt")
        taken = f"{{k[{len(prefix)}:]: c[k] for k in c if k.startswith({json.dumps(prefix)})}}"
        code = (
            f"import torch; from fastmatch.checkpoint import Checkpoint; c = Checkpoint({json.dumps(where)}); "
            f"torch.save({taken}, {json.dumps(str(out))})"
        )
        return f"{start}{origin.partition(';')[0]}; this writes them alone, without it: python -c {shlex.quote(code)}"
    start += f"{origin}, or take it off: "
    return start + f"{{k[{len(prefix)}:]: v for k, v in state.items() if k.startswith({prefix!r})}}"


def _others(names: Sequence[str]) -> str:
    """Return the names after the first one as text, some of them and how many there are."""
    if len(names) == 1:
        return ""
    shown = ", ".join(map(repr, names[1:4])) + (", ..." if len(names) > 4 else "")
    return f" (also {shown}; {len(names)} in all)"


def check_same_names(a: State, b: State, name_a: str = "model_a", name_b: str = "model_b") -> None:
    """Raise ValueError where names of tensors differ. They are listed, with the nearest one of the other."""
    lacking, extra = [n for n in a if n not in b], [n for n in b if n not in a]
    for inner, held, where in ((b, a, name_a), (a, b, name_b)):
        prefix = prefix_of(inner, held) if lacking and extra else ""
        # A small model may have the names of a layer of another one, but seldom its shapes.
        if prefix and all(held[prefix + name].shape == tensor.shape for name, tensor in inner.items()):
            raise ValueError(f"{where}: {under_prefix(prefix, held, where)}")
    if lacking:
        raise ValueError(
            f"{name_b}: has no tensor {lacking[0]!r}, which {name_a} has{_others(lacking)}; architectures must be equal"
            f"{nearest(lacking[0], extra, 'the nearest that it has is {}')}"
        )
    if extra:
        raise ValueError(
            f"{name_b}: has tensor {extra[0]!r}, which {name_a} has not{_others(extra)}; architectures must be equal"
        )


def check_same_architecture(a: State, b: State, name_a: str = "model_a", name_b: str = "model_b") -> None:
    """Raise ValueError where names or shapes of tensors differ."""
    check_same_names(a, b, name_a, name_b)
    for name, tensor in a.items():
        if b[name].shape != tensor.shape:
            raise ValueError(
                f"{name_b}: tensor {name!r} has shape {tuple(b[name].shape)}, "
                f"{name_a} has {tuple(tensor.shape)}; architectures must be equal"
            )


WITH_EXTREMES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of which torch finds the least and the largest entry."""


def _witness(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of which one is not finite if an entry of a tensor on the CPU is not, from one read and without a mask."""
    if tensor.dtype in WITH_EXTREMES and tensor.layout == torch.strided and tensor.numel():
        return torch.stack(tensor.aminmax())  # NaN is handed on
    return tensor.sum(dtype=torch.float64)


def check_finite(state: State, argument: str) -> None:
    """Raise ValueError naming the first tensor that holds NaN or infinity; of a divided one this rank's part is looked at."""
    # Elsewhere than on the CPU a sum is the witness: it is finite if every term is, except on overflow. Only then count.
    floating = {name: local_part(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    for name, tensor in floating.items():
        if tensor.is_meta:
            raise ValueError(
                f"{argument}: tensor {name!r} is on the meta device and has no values; load the weights, or only trace the "
                "model (PermutationSpec.trace)"
            )
    sums = {
        name: tensor.sum(dtype=torch.float64)
        for name, tensor in floating.items()
        if tensor.device.type != "cpu"
    }
    # The host waits for each device once.
    fine = {
        device: bool(torch.isfinite(torch.stack([x for x in sums.values() if x.device == device])).all())
        for device in {x.device for x in sums.values()}
    }
    for name, tensor in floating.items():
        witness = sums[name] if name in sums else _witness(tensor)
        if fine.get(tensor.device) or bool(torch.isfinite(witness).all()):
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{argument}: tensor {name!r} holds {bad} NaN or infinite values")
