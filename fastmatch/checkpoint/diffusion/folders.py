"""Folders of diffusers: one network with its config.json, and pipelines of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fastmatch._internal.json_files import read_json
from fastmatch._internal.words import error_line
from fastmatch.checkpoint.diffusion.components import (
    KINDS,
    Component,
    Kind,
    import_diffusers,
    made_empty,
    parameters_of,
)
from fastmatch.checkpoint.diffusion.layout import Part, Shapes, Source
from fastmatch.checkpoint.diffusion.single_file import FileModel, prove_components
from fastmatch.checkpoint.reader import CONFIG
from fastmatch.permutations.verify import Verification
from fastmatch.spec import PermutationSpec

__all__ = ["class_of", "folder_component", "is_diffusers", "is_known", "prove_folder", "trace_folder"]

CLASS = "_class_name"

SHRINK = (
    "block_out_channels", "cross_attention_dim", "norm_num_groups", "projection_class_embeddings_input_dim",
    "addition_time_embed_dim", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim",
)  # fmt: skip
"""Sizes in a config that a reduced model divides."""


def class_of(folder: str | Path) -> str | None:
    """Return the class of diffusers that a folder's config.json names; None if it names none."""
    path = Path(folder) / CONFIG
    return read_json(path).get(CLASS) if path.is_file() else None


def is_diffusers(folder: str | Path) -> bool:
    """Whether a folder holds one network of diffusers."""
    return class_of(folder) is not None


def is_known(folder: str | Path) -> bool:
    """Whether a folder holds a network of diffusers whose inputs are known."""
    return class_of(folder) in _known()


def _known() -> dict[str, Kind]:
    return {kind.class_name: kind for kind in KINDS if hasattr(import_diffusers(), kind.class_name)}


def trace_folder(folder: str | Path) -> PermutationSpec:
    """Trace the network that a folder's config.json describes, in the names of its class.

    Raises:
        ImportError: diffusers is not installed (the extra ``diffusers``).
        ValueError: the class is none whose inputs are known, or the config does not fit it.
    """
    component = folder_component(folder)
    model = FileModel([component], component.shapes)
    return PermutationSpec.trace(model, model.examples)


def prove_folder(folder: str | Path, spec: PermutationSpec) -> Verification:
    """Verify a reduced model of a folder's network; see :func:`prove_components`."""
    return prove_components([folder_component(folder)], spec, str(folder))


def folder_component(folder: str | Path) -> Component:
    """Return the network that a folder's config.json describes.

    Raises:
        ImportError, ValueError: see :func:`trace_folder`.
    """
    name = class_of(folder)
    known = _known()
    if name not in known:
        raise ValueError(
            f"{Path(folder) / CONFIG}: expected one of {', '.join(known)} as {CLASS!r}, whose inputs are known; got {name!r}"
        )
    kind_of_module = getattr(import_diffusers(), name)
    try:
        whole: Any = made_empty(lambda: kind_of_module.from_config(read_json(Path(folder) / CONFIG)))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{Path(folder) / CONFIG}: no {name} can be built from it ({error_line(error)})"
        ) from error

    def build(_: Shapes, scale: int) -> nn.Module:
        # The module's own config has the defaults as well.
        return made_empty(lambda: kind_of_module.from_config(_shrunk(dict(whole.config), scale)))

    shapes = parameters_of(whole)
    layout = {
        name: Source((Part(name, 0, shape[0], shape[0]),)) if shape else Source((Part(name, 0, 1, 1),))
        for name, shape in shapes.items()
    }
    return Component(replace(known[name], build=build), "", shapes, layout, is_module=True)


def _shrunk(config: dict[str, Any], scale: int) -> dict[str, Any]:
    """Return a config with its sizes divided; heads stay as many, and become narrower."""
    if scale == 1:
        return config

    def divided(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [divided(n) for n in value]
        if value is not None and value % scale:
            raise ValueError(f"{value} is not a multiple of {scale}")
        return None if value is None else value // scale

    found = {key: divided(value) if key in SHRINK else value for key, value in config.items()}
    if "joint_attention_dim" in config:  # here this is the width of a head, elsewhere their number
        found["attention_head_dim"] = divided(config["attention_head_dim"])
    if "axes_dims_rope" in config:
        head = found["attention_head_dim"]
        side = head // 16 * 7 // 2 * 2
        found["axes_dims_rope"] = (head - 2 * side, side, side)
    return found
