"""Find the structure of a checkpoint, whatever kind it is, and what two checkpoints have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fastmatch._internal.json_files import read_json
from fastmatch._internal.states import check_same_architecture, prefix_before
from fastmatch._internal.ties import tied_names
from fastmatch.checkpoint.diffusion.components import UNUSED, find_components, has_networks
from fastmatch.checkpoint.diffusion.folders import folder_component, is_diffusers, prove_folder, trace_folder
from fastmatch.checkpoint.diffusion.namings import translation
from fastmatch.checkpoint.diffusion.pipeline import networks_of, prove_pipeline, trace_pipeline
from fastmatch.checkpoint.diffusion.single_file import FileModel, prove_file, trace_file
from fastmatch.checkpoint.names import RenamedCheckpoint
from fastmatch.checkpoint.proof import prove_config
from fastmatch.checkpoint.reader import ADAPTER, CONFIG, Checkpoint
from fastmatch.checkpoint.structure import build_empty, trace_config
from fastmatch.permutations.verify import Verification
from fastmatch.spec import PermutationSpec
from fastmatch.spec.common import moved_dimensions, other_sizes, restricted
from fastmatch.spec.unread import Unread

log = logging.getLogger("fastmatch")

__all__ = [
    "check_no_adapter",
    "common_spec",
    "is_diffusion",
    "models_of",
    "names_in",
    "prove_checkpoint",
    "take_names",
    "take_tied_names",
    "trace_checkpoint",
]


def is_diffusion(path: str | Path, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds networks of a diffusion model: a single file, or a folder of diffusers."""
    if checkpoint.parts:
        return True
    return is_diffusers(path) if Path(path).is_dir() else has_networks(checkpoint)


def models_of(checkpoint: Checkpoint) -> Iterator[FileModel]:
    """Yield each network in a file of a diffusion model, or in a folder of diffusers, as a module without weights."""
    if checkpoint.path.is_dir():
        components = [folder_component(checkpoint.path)]
    else:
        components = find_components(_shapes(checkpoint.headers), str(checkpoint.path))
    for component in components:
        shapes = {component.prefix + name: shape for name, shape in component.shapes.items()}
        yield FileModel([component], shapes)


def take_names(checkpoint: Checkpoint, other: Checkpoint) -> None:
    """Give a checkpoint the names that its tensors have in another one; a line of the logger ``fastmatch`` names a prefix."""
    names, prefixes = _names_and_prefixes(other, checkpoint)
    pair = checkpoint, other
    for prefix, one, two in zip(prefixes, pair, reversed(pair), strict=True):
        if prefix:
            log.warning(
                "%s: the prefix %r of all its names, which %s has not, does not count",
                one.path,
                prefix,
                two.path,
            )
    checkpoint.rename(names)


def take_tied_names(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """Give parameters of several names, which are stored twice in one of two checkpoints, the names that ``other`` has.

    The models are those that transformers builds by the config.json of a folder, or of a pipeline's folders.

    Returns:
        Name that was added -> the name that the tensor has in the file.
    """
    added: dict[str, str] = {}
    folders = [("", checkpoint, other)]
    if checkpoint.parts:
        parts = networks_of(checkpoint.parts)
        folders = [(f"{name}.", part, other.parts[name]) for name, part in parts if name in other.parts]
    for prefix, one, two in folders:
        paths = [c.path for c in (one, two) if (c.path / CONFIG).is_file() and not is_diffusion(c.path, c)]
        if paths and one.keys() != two.keys():
            tied = tied_names(build_empty(paths[0]))
            added |= checkpoint.take_names(other, [[prefix + name for name in names] for names in tied])
    return added


def names_in(other: Checkpoint, *, of: Checkpoint) -> dict[str, str]:
    """Return name -> the one that another checkpoint has, for tensors that it names differently.

    These are networks in a file of a diffusion model, and all tensors where one of the two has a prefix before every name.
    """
    return _names_and_prefixes(other, of)[0]


def _names_and_prefixes(other: Checkpoint, of: Checkpoint) -> tuple[dict[str, str], tuple[str, str]]:
    """Return what :func:`names_in` does, and the prefixes that all names of ``of`` and of ``other`` have."""
    if of.parts or other.parts or of.modules or other.modules:
        return {}, ("", "")
    own, others = prefix_before(other, of), prefix_before(of, other)
    found: dict[str, str] = {}
    if not (of.path.is_dir() or other.path.is_dir()):
        found = translation(_shapes(of.headers), _shapes(other.headers), str(of.path), str(other.path))
    if not found and own:
        found = {name: name.removeprefix(own) for name in of}
    elif not found and others:
        found = {name: others + name for name in of}
    return found, (own, others)


def trace_checkpoint(
    path: str | Path, checkpoint: Checkpoint, *, unread: Unread = "refuse"
) -> PermutationSpec:
    """Trace a checkpoint from the names and shapes in a file, or from the config.json of a folder.

    Raises:
        ImportError, FileNotFoundError, ValueError: see :func:`trace_config` and :func:`trace_file`.
    """
    if Path(path).is_dir() and not is_diffusion(path, checkpoint):
        check_no_adapter(path)
        return trace_config(path, unread=unread)
    if unread != "refuse":
        raise ValueError(
            f"unread: expected 'refuse' for {path}, whose networks are read whole; got {unread!r}"
        )
    if checkpoint.parts:
        return trace_pipeline(checkpoint.parts, str(path))
    return trace_folder(path) if Path(path).is_dir() else trace_file(_shapes(checkpoint.headers), str(path))


def check_no_adapter(path: str | Path) -> None:
    """Raise ValueError if a folder holds an adapter of peft and no model."""
    file = Path(path) / ADAPTER
    if not file.is_file() or (Path(path) / CONFIG).is_file():
        return
    base = read_json(file).get("base_model_name_or_path") or "a model that its config does not name"
    raise ValueError(
        f"{path}: holds an adapter of {base}, not a model; align {base} with --permutations FILE, then move the adapter with "
        "`fastmatch apply FILE ADAPTER`"
    )


def prove_checkpoint(path: str | Path, checkpoint: Checkpoint, spec: PermutationSpec) -> Verification | None:
    """Verify reduced models of what a checkpoint holds; None for a config of which no small model runs.

    Raises:
        ValueError: permuting a reduced model changes its function.
    """
    if checkpoint.parts:
        return prove_pipeline(checkpoint.parts, spec)
    if Path(path).is_dir():
        return prove_folder(path, spec) if is_diffusers(path) else prove_config(path, spec)
    return prove_file(_shapes(checkpoint.headers), spec, str(path))


def _shapes(headers: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in headers.items()}


def common_spec(
    spec: PermutationSpec, model_a: RenamedCheckpoint, model_b: RenamedCheckpoint
) -> PermutationSpec:
    """Return B's spec restricted to tensors that A has as well.

    Of a diffusion model, A may lack what is not needed to run it (running means, schedules) and whole networks; where it
    has one, it may differ in the size of an axis that keeps its order, such as the channels of the input. Of other models,
    tensors may differ so too, such as a head for other classes; a line of the logger ``fastmatch`` lists them.

    Raises:
        ValueError: the architectures differ otherwise. The first difference is named.
    """
    a, b = model_a.checkpoint, model_b.checkpoint
    path_a, path_b = str(a.path), str(b.path)
    if not is_diffusion(b.path, b):
        return _without_other_sizes(spec, model_a, model_b)
    if b.path.is_dir():
        prefixes = [f"{part}." for part in b.parts] or [""]
    else:
        prefixes = [c.prefix for c in find_components(_shapes(b.headers), path_b)]
    absent = [p for p in prefixes if not any(name.startswith(p) for name in a)]
    if len(absent) == len(prefixes):
        raise ValueError(f"{path_a}: has none of the networks of {path_b}; architectures must be equal")
    moved = moved_dimensions(spec)
    kept = set()
    for name, shape in spec.shapes.items():
        owner = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        other = tuple(model_a.headers[name].shape) if name in model_a.headers else None
        if other == shape:
            kept.add(name)
        elif other is not None:
            if len(other) != len(shape) or any(
                n != m for d, (n, m) in enumerate(zip(other, shape, strict=True)) if (name, d) in moved
            ):
                raise ValueError(
                    f"{path_a}: tensor {name!r} has shape {other}, {path_b} has {shape}; architectures must be equal"
                )
        elif owner is not None and owner not in absent:
            raise ValueError(
                f"{path_a}: has no tensor {name!r}, which {path_b} has; architectures must be equal"
            )
    for name in a:
        if name not in b and any(name.startswith(p) for p in prefixes if p) and not name.endswith(UNUSED):
            raise ValueError(
                f"{path_b}: has no tensor {name!r}, which {path_a} has; architectures must be equal"
            )
    return restricted(spec, kept)


def _without_other_sizes(
    spec: PermutationSpec, model_a: RenamedCheckpoint, model_b: RenamedCheckpoint
) -> PermutationSpec:
    """Return the spec without tensors that differ in the size of an axis that no group moves, such as another task's head."""
    a, b = model_a.checkpoint, model_b.checkpoint
    left = [name for name in other_sizes(spec, model_a.headers, model_b.headers) if model_b.is_whole(name)]
    files = {model_b.source_of(name) for name in left}
    # Layers that a library runs after the model belong to B alone.
    own = {f"{folder}.{name}" for c in (a, b) for folder, part in c.modules.items() for name in part}
    compared = {k: b.headers[k] if k in files else v for k, v in a.headers.items() if k not in own}
    expected = {k: v for k, v in b.headers.items() if k not in own}
    check_same_architecture(compared, expected, str(a.path), str(b.path))
    if not left:
        return spec
    log.warning(
        "%s: not matched, and written as they are, because they have another size in %s: %s",
        b.path, a.path, ", ".join(f"{n} {tuple(b.headers[n].shape)}, not {tuple(a.headers[n].shape)}" for n in sorted(files)),
    )  # fmt: skip
    return restricted(spec, set(spec.shapes) - set(left))
