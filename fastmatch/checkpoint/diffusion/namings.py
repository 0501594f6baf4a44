"""One network in two files that name it differently: with another prefix, or as another program wrote it."""

from __future__ import annotations

from fastmatch.checkpoint.diffusion.components import Component, find_components, marked
from fastmatch.checkpoint.diffusion.layout import Shapes

__all__ = ["translation"]


def translation(theirs: Shapes, ours: Shapes, their_file: str, our_file: str) -> dict[str, str]:
    """Return what tensors of another file are called in ours: those of networks of which it has none of our names.

    Args:
        theirs, ours: name -> shape of every tensor in both files.
        their_file, our_file: the files in errors.

    Raises:
        ImportError, ValueError: see :func:`find_components`.
    """
    if marked(ours) <= theirs.keys() or marked(theirs) <= ours.keys():
        return {}
    unknown = [c for c in find_components(ours, our_file) if not _has_any(theirs, c)]
    others = [c for c in find_components(theirs, their_file) if not _has_any(ours, c)]
    found: dict[str, str] = {}
    for component in unknown:
        same = [c for c in others if _is_same_network(c, component)]
        if len(same) == 1:
            found |= _by_parameter(same[0], component)
    return found


def _has_any(shapes: Shapes, component: Component) -> bool:
    return any(component.prefix + name in shapes for name in component.shapes)


def _is_same_network(one: Component, two: Component) -> bool:
    return one.kind.class_name == two.kind.class_name and one.layout.keys() == two.layout.keys()


def _by_parameter(theirs: Component, ours: Component) -> dict[str, str]:
    """Return their names -> ours, by the parameters of the module; nothing where one has in parts what the other has whole."""
    found: dict[str, str] = {}
    for parameter, source in ours.layout.items():
        other = theirs.layout[parameter]
        places = [[(p.start, p.stop, p.rows) for p in s.parts] for s in (source, other)]
        if places[0] != places[1] or source.transposed != other.transposed:
            return {}
        for mine, part in zip(source.parts, other.parts, strict=True):
            found[theirs.prefix + part.name] = ours.prefix + mine.name
    return found
