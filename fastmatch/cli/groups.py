"""Groups on the command line: what each of them is, and the choice of some by names and patterns."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from math import prod

from fastmatch._internal.checks import nearest
from fastmatch.spec import PermutationSpec

__all__ = ["described", "kinds", "selected"]


def kinds(spec: PermutationSpec) -> dict[str, str]:
    """Return group name -> what the group is, in words that patterns can be written for.

    ``layers.0.mlp.hidden`` are the units inside a block, ``layers.3.attention.heads`` and ``...heads.channels`` those of
    attention, and ``residual`` the units of a residual stream. The path is the longest that the layers that carry the
    group have in common.
    """
    streams = set(spec.residual())
    outer = {group.within for group in spec.groups.values() if group.within}
    found: dict[str, str] = {}
    for name, group in spec.groups.items():
        if group.within:
            found[name] = f"{found.get(group.within, group.within)}.channels[{group.block}]"
            continue
        if name in streams:
            kind = "residual"
        else:
            kind = "heads" if name in outer else "hidden"
            place = _common([axis.parameter.rpartition(".")[0] for axis in group.axes])
            kind = f"{place}.{kind}" if place else f"{name}.{kind}"
        count = sum(other == kind or other.startswith(f"{kind}.") for other in found.values())
        found[name] = kind if not count else f"{kind}.{count + 1}"
    return found


def _common(paths: list[str]) -> str:
    """Return the path that all paths begin with."""
    parts = [path.split(".") for path in paths]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def described(spec: PermutationSpec) -> str:
    """Return the spec's table with a column that says what each group is, and the share of the parameters that can move."""
    words = kinds(spec)
    width = max([4, *map(len, words.values())])
    lines = spec.table().splitlines()
    head, rest = lines[0], lines[1:]
    shown = [f"{'kind':<{width}}  {head}"]
    shown += [f"{kind:<{width}}  {line}" for kind, line in zip(words.values(), rest, strict=False)]
    return "\n".join([*shown, *rest[len(words) :], "", _movable(spec)])


def _movable(spec: PermutationSpec) -> str:
    """Return as text how many of the entries of all parameters are on an axis of a group."""
    moving = {axis.parameter for group in spec.groups.values() for axis in group.axes}
    sizes = {name: prod(shape) for name, shape in spec.shapes.items()}
    total = sum(sizes.values())
    share = sum(sizes[name] for name in moving) / max(total, 1)
    return f"{share:.1%} of {total:,} parameters can move"


def selected(spec: PermutationSpec, args: argparse.Namespace) -> PermutationSpec:
    """Return the spec with only the groups that ``--groups`` and ``--no-residual`` leave free to move.

    Raises:
        ValueError: a name or pattern fits no group.
    """
    streams = spec.residual()
    if args.groups is not None:
        words = kinds(spec)
        chosen: set[str] = set()
        for pattern in args.groups:
            fits = {n for n, kind in words.items() if pattern in (n, kind)}
            fits = fits or {
                n for n, kind in words.items() if fnmatchcase(n, pattern) or fnmatchcase(kind, pattern)
            }
            if not fits:
                raise ValueError(
                    f"--groups: {pattern!r} is not in the spec and fits no group of {_listed([*words.items()])}"
                    f"{nearest(pattern, [*words, *words.values()])}"
                )
            chosen |= fits
        spec = spec.select([name for name in spec.groups if name in chosen])
    if not args.residual:
        spec = spec.select([name for name in spec.groups if name not in streams])
    return spec


def _listed(groups: list[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} ({kind})" for name, kind in groups[:6])
    return shown if len(groups) <= 6 else f"{shown} and {len(groups) - 6} more"
