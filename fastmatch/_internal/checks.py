"""Checks of options, each with an error that names the argument, what was expected and what came."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

__all__ = [
    "check_choice",
    "check_format",
    "check_fraction",
    "check_integer",
    "check_limit",
    "check_number",
    "check_type",
    "check_weights",
    "nearest",
]


def nearest(name: str, names: Iterable[str], text: str = "did you mean {}?") -> str:
    """Return ``"; did you mean 'x'?"`` with the name that is most alike, or nothing if none is."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return "; " + text.format(repr(found[0])) if found else ""


def check_choice(name: str, value: object, choices: Any, other: str = "") -> None:
    """Raise ValueError unless ``value`` is one of the words of ``choices``, a ``Literal`` type; ``other`` says what else may be given."""
    words = get_args(choices)
    if not isinstance(value, str) or value not in words:
        expected = ", ".join(map(repr, words)) + (f", or {other}" if other else "")
        raise ValueError(f"{name}: expected one of {expected}; got {value!r}")


def check_integer(name: str, value: object, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``."""
    if type(value) is int and value >= least:  # isinstance of an abstract class takes ten times as long
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a whole number of at least {least}; got {value!r}")


def check_limit(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number of at least 0; infinity allows everything."""
    if value != math.inf:
        check_number(name, value)


def check_number(name: str, value: object, *, least: float = 0.0, exclusive: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least (``exclusive``: above) ``least``."""
    if not _is_finite(value) or value < least or (exclusive and value == least):  # type: ignore[operator]
        relation = "above" if exclusive else "of at least"
        raise ValueError(f"{name}: expected a finite number {relation} {least:g}; got {value!r}")


def _is_finite(value: object) -> bool:
    """Whether the value is a finite number, of Python or NumPy, that fits a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_type(name: str, value: object, expected: type) -> None:
    """Raise TypeError unless ``value`` is an object of the class ``expected``."""
    if not isinstance(value, expected):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        article = "an" if expected.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name}: expected {article} {expected.__name__}, got {got}")


def check_named(name: str, values: object) -> None:
    """Raise TypeError unless ``values`` is a mapping from names."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping such as {{'a': model_a}}, got {type(values).__name__}")


def check_fraction(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number from 0 to 1."""
    check_number(name, value)
    if float(value) > 1.0:  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected a number from 0 to 1; got {value!r}")


def check_format(path: str | Path, argument: str, suffixes: Iterable[str]) -> None:
    """Raise ValueError unless the suffix of ``path`` is one of ``suffixes``: it decides the format of the file."""
    if Path(path).suffix not in set(suffixes):
        raise ValueError(f"{argument}: expected a file ending in {', '.join(sorted(suffixes))}, got {path}")


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one finite weight per model; equal weights for None.

    Raises:
        ValueError: the number of weights is not ``count``, or one is not finite.
    """
    if weights is None:
        return [1.0 / count] * count
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, Iterable):
        raise TypeError(f"weights: expected {count} numbers, got {type(weights).__name__}")
    try:
        values = [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise TypeError(f"weights: expected {count} numbers, got {weights!r}") from error
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one per model, got {len(values)}")
    if not all(abs(w) < float("inf") for w in values):
        raise ValueError(f"weights: expected finite numbers; got {values}")
    return values
