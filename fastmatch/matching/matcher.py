"""What a matcher and a strategy are, and the checks of arguments that should be one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from torch import nn

from fastmatch._internal.batches import check_module
from fastmatch._internal.states import State
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.spec import PermutationSpec

__all__ = [
    "Matcher",
    "Model",
    "Models",
    "Strategy",
    "as_code",
    "check_matcher",
    "check_rereadable",
    "check_strategy",
    "modules_of",
]

Model: TypeAlias = nn.Module | State
"""A torch module or a state dict."""

Models: TypeAlias = Sequence[Model]


class Matcher(ABC):
    """How the hidden units of two models are matched.

    Subclasses are frozen dataclasses. Their fields are the options, which the constructor checks.
    """

    @abstractmethod
    def match(
        self, model_a: Model, model_b: Model, spec: PermutationSpec, *, progress: bool | None = None
    ) -> Matching:
        """Match the units of model B to those of model A.

        Args:
            model_a, model_b: models of the same architecture; A is the reference. Neither is changed.
            spec: which axes move together.
            progress: show progress bars; None shows them on a terminal.
        """


class Strategy(ABC):
    """How many models are brought into one order of units.

    Subclasses are frozen dataclasses. Their fields are the options, which the constructor checks.
    """

    @abstractmethod
    def match(
        self, models: Models, spec: PermutationSpec, reference: int = 0, *, progress: bool | None = None
    ) -> list[Alignment]:
        """Return one alignment per model; that of ``models[reference]`` is the identity.

        Args:
            models: two or more models of the same architecture. None of them is changed.
            spec: which axes move together.
            reference: the index of the model whose order of units the others take.
            progress: show progress bars; None shows them on a terminal.
        """


def as_code(method: Matcher | Strategy) -> str:
    """Return a matcher or strategy as Python, with ``...`` for data, functions and tensors."""

    def text_of(value: object) -> str:
        if isinstance(value, (Matcher, Strategy)):
            return as_code(value)
        return repr(value) if value is None or isinstance(value, (str, int, float)) else "..."

    given = [(field.name, getattr(method, field.name), field.default) for field in fields(method)]  # type: ignore[arg-type]
    changed = [f"{name}={text_of(value)}" for name, value, default in given if value is not default]
    return f"{type(method).__name__}({', '.join(changed)})"


def check_matcher(name: str, value: object, kind: type[Matcher] = Matcher) -> None:
    """Raise TypeError, with what to write instead, unless ``value`` is a matcher of the class ``kind``."""
    if isinstance(value, kind):
        return
    if kind is Matcher:
        expected = "a matcher such as fm.WeightMatching() or fm.ActivationMatching(data)"
    else:
        expected = f"fm.{kind.__name__}(...)"
    if isinstance(value, Strategy):
        raise TypeError(
            f"{name}: {type(value).__name__} is a strategy for many models; give it to fm.align_many, "
            f"and {expected} here"
        )
    raise TypeError(f"{name}: expected {expected}, {_got(value)}")


def check_strategy(name: str, value: object) -> None:
    """Raise TypeError, with what to write instead, unless ``value`` is a strategy for many models."""
    if isinstance(value, Strategy):
        return
    if isinstance(value, Matcher):
        raise TypeError(
            f"{name}: {type(value).__name__} matches two models; write fm.ToReference(matcher) or "
            "fm.Chain(matcher) to match many models with it"
        )
    raise TypeError(f"{name}: expected a strategy such as fm.ToReference() or fm.MergeMany(), {_got(value)}")


def _got(value: object) -> str:
    if isinstance(value, type) and issubclass(value, (Matcher, Strategy)):
        return f"got the class {value.__name__}; write {value.__name__}(...)"
    return f"got {value!r}" if isinstance(value, (str, int, float)) else f"got {type(value).__name__}"


def modules_of(model_a: Model, model_b: Model) -> tuple[nn.Module, nn.Module]:
    """Return both models; TypeError if one of them is a state dict, which cannot be run."""
    check_module(model_a, "model_a")
    check_module(model_b, "model_b")
    assert isinstance(model_a, nn.Module)
    assert isinstance(model_b, nn.Module)
    return model_a, model_b


def check_rereadable(name: str, matcher: Matcher) -> None:
    """Raise TypeError if the data of ``matcher`` is an iterator, which a second pair could not read again."""
    if isinstance(_data_of(matcher), Iterator):
        raise TypeError(
            f"{name}: its data is read again for each pair of models, but an iterator (a generator, say) can "
            "be read only once; give a loader or a list of batches"
        )


def _data_of(matcher: object) -> Any:
    """The first field called ``data`` of a matcher or of the matchers that it is made of."""
    if not is_dataclass(matcher):
        return None
    values = {field.name: getattr(matcher, field.name) for field in fields(matcher)}
    inner = (_data_of(value) for value in values.values() if isinstance(value, Matcher))
    return values.get("data", next((data for data in inner if data is not None), None))
