"""Recipes: what is merged and how, read from YAML, JSON or a mapping, and checked before any work.

The keys are mergekit's where they mean the same (``models``, ``parameters``, ``merge_method: linear``, ``base_model``,
``dtype``), and further ones for what mergekit does not do. A key that is not known is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from fastmatch._internal.checks import check_choice, check_integer, check_number, nearest
from fastmatch._internal.json_files import read_json
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.fisher import FisherMatching
from fastmatch.matching.matcher import Matcher
from fastmatch.matching.straight_through import StraightThrough
from fastmatch.matching.weights import WeightMatching
from fastmatch.merging.average import Biases
from fastmatch.renorm.options import Renormalization

__all__ = ["Recipe", "Step", "as_text", "read_recipe"]

MATCHERS: dict[str, type[Matcher]] = {
    "weights": WeightMatching,
    "activations": ActivationMatching,
    "fisher": FisherMatching,
    "straight-through": StraightThrough,
}

OPTIONS: dict[str, tuple[str, ...]] = {
    "weights": ("init", "max_sweeps", "tolerance", "include", "seed", "balance"),
    "activations": ("similarity", "site", "reduce"),
    "fisher": ("labels", "samples", "seed"),
    "straight-through": ("epochs", "learning_rate"),
}
"""The options of the matchers that are words, numbers and truth values."""

PYTHON_ONLY: dict[str, str] = dict.fromkeys(
    ("ascent", "projection", "loss", "forward"),
    "this option is a Python object, for which a recipe has no form",
)
"""Options of the matchers that a recipe does not take -> why."""

MatcherWord: TypeAlias = Literal["weights", "activations", "fisher", "straight-through"]

KEYS = (
    "models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "network", "input_shape", "align",
    "biases", "renormalize", "evaluate", "out",
)  # fmt: skip

OTHERS = {
    "slices": "layers of several models are not stacked here; list whole models under 'models'",
    "modules": "parts of a model are not merged apart; list whole models under 'models'",
    "tokenizer": "the output has the tokenizer of the reference model",
    "tokenizer_source": "the output has the tokenizer of the reference model",
    "chat_template": "the output has the chat template of the reference model",
    "random_seed": "seeds are options of the matcher, under 'align'",
}
"""Keys of mergekit that mean something that is not done here -> what to do."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe: a word and the options beside it."""

    word: str
    data: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        models: paths of the checkpoints.
        weights: their coefficients in the merge.
        reference: position of the model whose order of units, and whose files, the output has.
        network: ``module:callable`` that returns the network; None for directories with a config.json.
        input_shape: of a random example input; None if the callable returns one.
        align: the matcher; None for models that are aligned already.
        biases: as for :func:`fastmatch.merge`.
        renormalize: the method; None for none.
        evaluate: the labelled data, with ``points``; None for none.
        dtype: element type of the output; None keeps that of the reference.
        out: file or directory to write.
        given: the recipe as it was written.
    """

    models: tuple[str, ...]
    weights: tuple[float, ...]
    reference: int
    network: str | None
    input_shape: tuple[int, ...] | None
    align: Step | None
    biases: Biases
    renormalize: Step | None
    evaluate: Step | None
    dtype: torch.dtype | None
    out: Path
    given: dict[str, Any]


def read_recipe(source: str | Path | Mapping[str, Any], out: str | Path | None = None) -> Recipe:
    """Return a recipe from a .yaml, .yml or .json file, or from a mapping.

    Args:
        source: the file or the mapping.
        out: where to write, in place of the recipe's ``out``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file is YAML and PyYAML is not installed.
        ValueError: a key is unknown, missing, or has a value that is not understood. The key is named.
    """
    given = dict(source) if isinstance(source, Mapping) else _loaded(Path(source))
    _check_keys(given, KEYS, "", OTHERS)
    method = given.get("merge_method", "linear")
    if method != "linear":
        raise ValueError(f"merge_method: expected 'linear', a weighted average; {method!r} is not done here")
    models, weights = _models_of(given)
    base = given.get("base_model")
    if base is not None and base not in models:
        raise ValueError(
            f"base_model: expected one of the models {models}, whose order the output takes; got {base!r}"
        )
    where = given.get("out") if out is None else str(out)
    if not isinstance(where, str) or not where:
        raise ValueError(f"out: expected the file or directory to write; got {where!r}")
    biases = given.get("biases", "average")
    check_choice("biases", biases, Biases)
    network = _text("network", given.get("network"))
    shape = given.get("input_shape")
    if shape is not None:
        if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
            raise ValueError(f"input_shape: expected whole numbers such as [2, 3, 32, 32]; got {shape!r}")
        for size in shape:
            check_integer("input_shape", size, least=1)
    if shape is not None and network is None:
        raise ValueError("input_shape: needs 'network'")
    return Recipe(
        models, weights, 0 if base is None else models.index(base), network, None if shape is None else tuple(shape),
        _align_of(given.get("align", "weights")), biases, _renormalize_of(given.get("renormalize")),
        _evaluate_of(given.get("evaluate")), _dtype_of(given), Path(where), {**given, "out": where},
    )  # fmt: skip


def as_text(mapping: Mapping[str, Any]) -> str:
    """Return a recipe as YAML, or as JSON, which is YAML too, where PyYAML is not installed."""
    try:
        import yaml
    except ImportError:
        return json.dumps(mapping, indent=2) + "\n"
    return yaml.safe_dump(json.loads(json.dumps(mapping)), sort_keys=False)


def _loaded(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: expected a recipe ending in .json, .yaml, .yml")
    try:
        import yaml
    except ImportError as error:
        raise ImportError("a recipe in YAML needs PyYAML: pip install 'fastmatch[pipeline]'") from error
    try:
        with path.open("rb") as file:  # PyYAML names the file in its errors
            found = yaml.safe_load(file)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that do not exist are a ValueError
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping of keys such as 'models'; got {type(found).__name__}")
    return found


def _check_keys(
    given: Mapping[Any, Any], known: Collection[str], place: str, others: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError for the first key that is not known, with the reason or the nearest one that is."""
    for key in given:
        if key in known:
            continue
        if others is not None and key in others:
            raise ValueError(f"{place}{key}: {others[key]}")
        listed = f"; expected one of {', '.join(known)}" if known else "; expected none"
        raise ValueError(f"{place}{key}: unknown key{nearest(str(key), known) or listed}")


def _text(key: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or ":" not in value):
        raise ValueError(f"{key}: expected module:callable or file.py:callable; got {value!r}")
    return value


def _models_of(given: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the paths and the weights, of sum one unless ``parameters.normalize`` is false."""
    listed = given.get("models")
    if not isinstance(listed, list) or len(listed) < 2:
        raise ValueError(f"models: expected a list of at least two; got {listed!r}")
    shared = _mapping("parameters", given.get("parameters"))
    _check_keys(shared, ("weight", "normalize"), "parameters.")
    normalize = shared.get("normalize", True)
    if not isinstance(normalize, bool):
        raise ValueError(f"parameters.normalize: expected true or false; got {normalize!r}")
    paths, weights = [], []
    for k, entry in enumerate(listed):
        place = f"models[{k}]."
        entry = _mapping(f"models[{k}]", {"model": entry} if isinstance(entry, str) else entry)
        _check_keys(entry, ("model", "parameters"), place)
        if not isinstance(entry.get("model"), str):
            raise ValueError(f"{place}model: expected a path; got {entry.get('model')!r}")
        own = _mapping(f"{place}parameters", entry.get("parameters"))
        _check_keys(own, ("weight",), f"{place}parameters.")
        weight = own.get("weight", shared.get("weight", 1.0))
        if isinstance(weight, list):
            raise ValueError(
                f"{place}parameters.weight: expected one number; weights by layer are not done here"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"{place}parameters.weight: expected a number; got {weight!r}")
        paths.append(entry["model"])
        weights.append(float(weight))
    if len(set(paths)) < len(paths):
        raise ValueError(f"models: the same model twice: {paths}")
    total = sum(weights)
    if normalize:
        check_number("models: the sum of the weights", total, exclusive=True)
        weights = [weight / total for weight in weights]
    return tuple(paths), tuple(weights)


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a mapping; got {value!r}")
    return value


def _step(key: str, value: Any, word_key: str, default: str) -> Step:
    """Return a step that is written as a word, or as a mapping with the word, ``data`` and options."""
    found = {word_key: value} if isinstance(value, str) else _mapping(key, value)
    options = {name: v for name, v in found.items() if name not in (word_key, "data")}
    return Step(found.get(word_key, default), _text(f"{key}.data", found.get("data")), options)


def _align_of(value: Any) -> Step | None:
    if value is False:
        return None
    if value is True:
        value = "weights"
    step = _step("align", value, "matcher", "weights")
    check_choice("align.matcher", step.word, MatcherWord)
    _check_keys(step.options, ("matcher", "data", *OPTIONS[step.word]), "align.", PYTHON_ONLY)
    if step.word == "weights" and step.data is not None:
        raise ValueError("align.data: matching by weights reads no data")
    if step.word != "weights" and step.data is None:
        raise ValueError(f"align.data: the matcher {step.word!r} needs a loader, as module:callable")
    MATCHERS[step.word](**({} if step.data is None else {"data": []}), **step.options)  # checks the options
    return step


def _renormalize_of(value: Any) -> Step | None:
    if value is None or value is False:
        return None
    step = _step("renormalize", value, "method", "auto")
    _check_keys(step.options, ("data", *(f.name for f in fields(Renormalization))), "renormalize.")
    Renormalization(step.word, **step.options)  # type: ignore[arg-type] - checks the options
    if step.data is None:
        raise ValueError("renormalize.data: needed, a loader as module:callable")
    return step


def _evaluate_of(value: Any) -> Step | None:
    if value is None or value is False:
        return None
    found = {"data": value} if isinstance(value, str) else _mapping("evaluate", value)
    _check_keys(found, ("data", "points"), "evaluate.")
    check_integer("evaluate.points", found.get("points", 7), least=3)
    if found.get("data") is None:
        raise ValueError("evaluate.data: needed, a loader of (inputs, targets) as module:callable")
    return Step("", _text("evaluate.data", found["data"]), {"points": found.get("points", 7)})


def _dtype_of(given: Mapping[str, Any]) -> torch.dtype | None:
    name = given.get("out_dtype", given.get("dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating point type such as bfloat16; got {name!r}")
    return dtype
