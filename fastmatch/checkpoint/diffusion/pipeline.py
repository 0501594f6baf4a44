"""Pipelines of diffusers: folders of networks, whose names are joined to those of their tensors.

Each network keeps its function by itself: what one hands to another keeps its order. So the structure of a pipeline is
that of its networks side by side, and what belongs to none of a known class is carried as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fastmatch.checkpoint.diffusion.folders import class_of, is_known, prove_folder, trace_folder
from fastmatch.checkpoint.names import Chunk, Layout, layout_of
from fastmatch.checkpoint.proof import prove_config
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.checkpoint.structure import build_empty, trace_config
from fastmatch.permutations.verify import Verification, joined
from fastmatch.spec import ActivationSite, PermutationSpec

__all__ = ["networks_of", "pipeline_layout", "prove_pipeline", "trace_pipeline"]

log = logging.getLogger("fastmatch")

NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Folders whose networks are aligned. A safety checker or an image encoder is carried."""


def trace_pipeline(parts: Mapping[str, Checkpoint], argument: str) -> PermutationSpec:
    """Trace the networks of a pipeline; the names of groups and tensors start with their folder's.

    Raises:
        ImportError, ValueError: see :func:`trace_folder` and :func:`trace_config`; or no network is of a known class.
    """
    specs = []
    for name, part in networks_of(parts):
        traced = trace_config(part.path) if class_of(part.path) is None else trace_folder(part.path)
        specs.append(_prefixed(traced, name + "."))
    if not specs:
        raise ValueError(f"{argument}: none of its folders holds a network of a known class")
    return PermutationSpec(
        groups={name: group for spec in specs for name, group in spec.groups.items()},
        shapes={name: shape for spec in specs for name, shape in spec.shapes.items()},
        pins=tuple(pin for spec in specs for pin in spec.pins),
        sites=tuple(_numbered(specs)),
    )


def _numbered(specs: Iterable[PermutationSpec]) -> Iterator[ActivationSite]:
    """Yield the sites of all networks, with numbers of operations that no two networks share."""
    count = 0
    for spec in specs:
        yield from (replace(site, op=site.op + count) for site in spec.sites)
        count += max((site.op for site in spec.sites), default=-1) + 1


def prove_pipeline(parts: Mapping[str, Checkpoint], spec: PermutationSpec) -> Verification | None:
    """Verify reduced models of the networks of a pipeline; None if one of them has no small model that runs.

    Raises:
        ValueError: permuting a reduced model changes its function.
    """
    proofs = []
    for name, part in networks_of(parts):
        own = _without_prefix(spec, name + ".")
        prove = prove_config if class_of(part.path) is None else prove_folder
        proofs.append(prove(part.path, own))
    found = [proof for proof in proofs if proof is not None]
    if len(found) < len(proofs):
        return None
    return joined(found, spec.groups)


def pipeline_layout(parts: Mapping[str, Checkpoint]) -> Layout:
    """Return the layout of a pipeline: transformers renames some tensors of text encoders on loading."""
    layout: Layout = {}
    known = [name for name, _ in networks_of(parts)]
    for name, part in parts.items():
        if name in known and class_of(part.path) is None:
            own = layout_of(build_empty(part.path), part.headers, str(part.path))
        else:
            own = {key: Chunk(key, tensor.shape) for key, tensor in part.headers.items()}
        layout |= {f"{name}.{k}": replace(c, parameter=f"{name}.{c.parameter}") for k, c in own.items()}
    return layout


def networks_of(parts: Mapping[str, Checkpoint]) -> Iterable[tuple[str, Checkpoint]]:
    """Yield the networks that are aligned; log those that are not."""
    for name, part in parts.items():
        if name in NETWORKS and (class_of(part.path) is None or is_known(part.path)):
            yield name, part
        else:
            log.info("%s: carried as it is", part.path)


def _prefixed(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    groups = {
        prefix + name: replace(
            group,
            name=prefix + name,
            axes=tuple(replace(axis, parameter=prefix + axis.parameter) for axis in group.axes),
            within=prefix + group.within if group.within else "",
        )
        for name, group in spec.groups.items()
    }
    pins = tuple(replace(pin, parameter=prefix + pin.parameter) for pin in spec.pins)
    sites = tuple(replace(site, group=prefix + site.group) for site in spec.sites)
    return PermutationSpec(groups, {prefix + name: shape for name, shape in spec.shapes.items()}, pins, sites)


def _without_prefix(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    groups = {
        name.removeprefix(prefix): replace(
            group,
            name=name.removeprefix(prefix),
            axes=tuple(replace(axis, parameter=axis.parameter.removeprefix(prefix)) for axis in group.axes),
            within=group.within.removeprefix(prefix),
        )
        for name, group in spec.groups.items()
        if name.startswith(prefix)
    }
    shapes = {name.removeprefix(prefix): s for name, s in spec.shapes.items() if name.startswith(prefix)}
    return PermutationSpec(groups, shapes)
