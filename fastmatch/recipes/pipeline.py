"""Run a recipe: align, merge, renormalize, evaluate, report, and write all of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmatch._internal.callables import loader_from, network_from
from fastmatch._internal.files import (
    STATE_SUFFIXES,
    check_format,
    check_target,
    load_state,
    save_state,
    writing,
)
from fastmatch._internal.model_files import named_as, named_for
from fastmatch._internal.modules import copy_module
from fastmatch._internal.outputs import real_path
from fastmatch._internal.states import check_finite, check_same_architecture, state_of
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch.checkpoint.align import WriteOptions, align_checkpoints
from fastmatch.checkpoint.pairs import open_pair
from fastmatch.checkpoint.reader import Checkpoint
from fastmatch.matching.align import align
from fastmatch.matching.matcher import Matcher
from fastmatch.matching.weights import WeightMatching
from fastmatch.merging.average import merge
from fastmatch.permutations.alignment import Alignment
from fastmatch.recipes.card import model_card
from fastmatch.recipes.recipe import MATCHERS, Recipe, Step, as_text, read_recipe
from fastmatch.renorm.options import Renormalization
from fastmatch.renorm.plan import applied_plan, new_biases, plan_renormalization
from fastmatch.renorm.renormalize import renormalize
from fastmatch.report.merge import merge_report
from fastmatch.report.report import Report
from fastmatch.spec import PermutationSpec

__all__ = ["Outcome", "pipeline"]

LOG = logging.getLogger("fastmatch")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a recipe made.

    Attributes:
        model: the merged network, renormalized if the recipe says so; None if it was written tensor by tensor.
        alignments: of every model but the reference, in their order; empty without alignment.
        report: what was done and measured.
        files: what was written: ``model``, ``recipe``, ``card``, ``report`` -> path.
    """

    model: nn.Module | None
    alignments: tuple[Alignment, ...]
    report: Report
    files: dict[str, Path]


def pipeline(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    force: bool = False,
    progress: bool | None = None,
) -> Outcome:
    """Align, merge, renormalize, evaluate and report, as a recipe says, and write the result.

    A recipe beside the output repeats the run; a model card and a page describe it.

    Example:
        >>> for name, model in {"a": model_a, "b": model_b}.items():
        ...     torch.save(model.state_dict(), f"{name}.pt")
        >>> import sys, types
        >>> sys.modules["my_module"] = types.SimpleNamespace(build=lambda: (model_a, x), loader=lambda: loader)
        >>> recipe = {
        ...     "models": ["a.pt", "b.pt"],
        ...     "network": "my_module:build",
        ...     "align": "weights",
        ...     "renormalize": {"method": "repair", "data": "my_module:loader"},
        ...     "out": "merged.safetensors",
        ... }
        >>> outcome = fm.pipeline(recipe)
        >>> sorted(path.name for path in outcome.files.values())
        ['merged.card.md', 'merged.recipe.yaml', 'merged.report.html', 'merged.safetensors']

    Args:
        recipe: a .yaml, .yml or .json file, or the mapping itself. The guide "Merge from a recipe" lists the keys.
        out: the file or directory to write, in place of the recipe's ``out``.
        force: replace outputs that exist.
        progress: show progress bars; None shows them on a terminal.

    Returns:
        An :class:`Outcome`.

    Raises:
        ValueError: a key of the recipe is unknown, or its value does not fit; the key is named.
        FileExistsError, FileNotFoundError: an output exists, or an input or a folder does not.
        ImportError: the recipe is YAML and PyYAML is not installed.
    """
    asked = read_recipe(recipe, out)
    files = _files_of(asked)
    for path in files.values():
        if path.parent != asked.out:
            check_target(path, force=force)
    for key, path in ((f"models[{k}]", path) for k, path in enumerate(asked.models)):
        if not Path(path).exists():
            raise FileNotFoundError(f"{key}: no file or directory {path}")
        if real_path(path) == real_path(asked.out):
            raise ValueError(f"out: {asked.out} is one of the models; choose another path")
    if asked.network is None:
        return _out_of_core(asked, files, force, progress)
    return _in_memory(asked, files, force, progress)


def _files_of(recipe: Recipe) -> dict[str, Path]:
    """Return what is written, beside a file or inside a directory."""
    out = recipe.out
    if all(Path(path).is_dir() for path in recipe.models):
        inside = {"recipe": "recipe.yaml", "card": "README.md", "report": "report.html"}
        return {"model": out, **{key: out / name for key, name in inside.items()}}
    check_format(out, "out", STATE_SUFFIXES)
    beside = {"recipe": ".recipe.yaml", "card": ".card.md", "report": ".report.html"}
    return {"model": out, **{key: out.with_suffix(suffix) for key, suffix in beside.items()}}


def _in_memory(recipe: Recipe, files: dict[str, Path], force: bool, progress: bool | None) -> Outcome:
    watch = Stopwatch()
    with watch("read"):
        network, example = _network_of(recipe)
        matcher = _matcher_of(recipe)
        calibration = _loader_of(recipe.renormalize, "renormalize")
        data = _loader_of(recipe.evaluate, "evaluate")
        files_hold = [_state_at(path) for path in recipe.models]
        states = [named_for(network, x, path) for x, path in zip(files_hold, recipe.models, strict=True)]
        models = [_loaded(network, state, path) for state, path in zip(states, recipe.models, strict=True)]
    first = models[recipe.reference]
    step = recipe.renormalize
    options = None if step is None else Renormalization(step.word, **step.options)  # type: ignore[arg-type]
    is_folder = files["recipe"].parent == recipe.out
    aligned, alignments = list(models), []
    if matcher is not None:
        with watch("trace"):
            spec = PermutationSpec.trace(first, example)
        if not spec.groups:
            raise ValueError(f"network: no group of units of {recipe.network} is free to move")
        if is_folder and options is not None:
            _check_biases(first, options, recipe.out)
        for k, model in enumerate(models):
            if k != recipe.reference:
                found = align(first, model, example, matcher, spec=spec, progress=progress)
                alignments.append(found)
                aligned[k] = found.apply(model)
                for part, seconds in found.seconds.items():
                    watch.seconds[part] = round(watch.seconds.get(part, 0.0) + seconds, 3)
    with watch("merge"):
        merged = merge(aligned, recipe.weights, biases=recipe.biases)
    final = None
    if options is not None:
        assert calibration is not None
        ends = None if options.method == "reset" else aligned
        with watch("renormalize"):
            final = renormalize(merged, ends, calibration, options, progress=progress)
    report = merge_report(
        merged, aligned, data, renormalized=final, weights=recipe.weights, names=recipe.models
    )
    if len(alignments) == 1:
        points = 7 if recipe.evaluate is None else recipe.evaluate.options["points"]
        names = recipe.models[recipe.reference], recipe.models[1 - recipe.reference]
        other = models[1 - recipe.reference]
        report = _joined(alignments[0].report(first, other, data, names=names, points=points), report)
    result = state_of(merged if final is None else final, "merge")
    held = states[recipe.reference]
    plan = None if final is None else applied_plan(final)
    added = () if plan is None else plan.added
    if added and is_folder:
        raise _no_place_for(added[0], recipe.out)
    if added:
        LOG.warning("renormalize: %s", new_biases(added))
    like = {
        name: held.get(name, held.get(f"{name.rpartition('.')[0]}.weight", tensor))
        for name, tensor in result.items()
    }
    result = {name: _cast(tensor, like[name], recipe.dtype) for name, tensor in result.items()}
    result = named_as(result, files_hold[recipe.reference], network)
    check_finite(
        result, f"{recipe.out} is not written: the result"
    )  # as it is in the file: types differ in range
    report = replace(
        report, seconds={**watch.seconds, **report.seconds}, command=as_text(recipe.given).strip()
    )
    if is_folder:
        from fastmatch.checkpoint.writer import write_like

        source = Checkpoint(recipe.models[recipe.reference])
        write_like(source, recipe.out, result.__getitem__, dtype=recipe.dtype, force=force)
    else:
        save_state(result, recipe.out, force=force)
    _write_texts(recipe, report, files)
    return Outcome(merged if final is None else final, tuple(alignments), report, files)


def _check_biases(model: nn.Module, options: Renormalization, out: Path) -> None:
    """Refuse before the alignment what would add biases for sure: its trace has read all layers.

    What the automatic choice takes is known after the calibration; and without alignment, so is which layers run.
    """
    if options.method in ("auto", "rescale", "reset"):
        return
    for name in plan_renormalization(model, options).layers:
        if getattr(model.get_submodule(name), "bias", None) is None:
            raise _no_place_for(f"{name}.bias", out)


def _no_place_for(bias: str, out: Path) -> ValueError:
    return ValueError(
        f"renormalize: it needs the new parameter {bias!r}, for which the architecture of {out} has no place; "
        'the methods "rescale" and "reset" need none'
    )


def _out_of_core(recipe: Recipe, files: dict[str, Path], force: bool, progress: bool | None) -> Outcome:
    """Align and merge two directories tensor by tensor."""
    if files["recipe"].parent != recipe.out:
        raise ValueError("network: needed unless all models are directories with a config.json")
    for key, is_given in (
        ("renormalize", recipe.renormalize is not None),
        ("evaluate", recipe.evaluate is not None),
        ("biases", recipe.biases != "average"),
    ):
        if is_given:
            raise ValueError(f"{key}: needs 'network'; directories without it are merged tensor by tensor")
    if recipe.align is None or recipe.align.word != "weights":
        raise ValueError("align: directories are matched by weights; other matchers need 'network'")
    if len(recipe.models) != 2:
        raise ValueError("models: two directories at a time can be merged without 'network'")
    if abs(sum(recipe.weights) - 1) > 1e-9:
        raise ValueError("parameters.normalize: two directories are merged with weights of sum one")
    path_a, path_b = recipe.models[recipe.reference], recipe.models[1 - recipe.reference]
    write = WriteOptions(recipe.weights[1 - recipe.reference], recipe.dtype, force)
    matcher = WeightMatching(**recipe.align.options)
    found = align_checkpoints(path_a, path_b, recipe.out, matcher, write=write, progress=progress)
    report = found.report(*open_pair(path_a, path_b, found.spec), names=(path_a, path_b))
    report = replace(report, title="Merge of 2 networks", command=as_text(recipe.given).strip())
    _write_texts(recipe, report, files)
    return Outcome(None, (found,), report, files)


def _joined(first: Report, second: Report) -> Report:
    """Return one report of an alignment and of the merge after it."""
    return replace(
        first,
        title=second.title,
        subtitle=second.subtitle,
        sentences=(*first.sentences, *second.sentences),
        tiles=(*first.tiles[:3], *second.tiles[:3], *first.tiles[3:]),
        tables=(*first.tables[:1], *second.tables[:1], *first.tables[1:], *second.tables[1:]),
        seconds={**first.seconds, **second.seconds},
        recipe={**second.recipe, **first.recipe},
    )


def _write_texts(recipe: Recipe, report: Report, files: dict[str, Path]) -> None:
    """Write recipe, card and report. They belong to the output, so those of an earlier one are replaced."""
    texts = {"recipe": as_text(recipe.given), "card": model_card(recipe, report), "report": report.html()}
    for key, text in texts.items():
        with writing(files[key], force=True) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _cast(tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor of the result in the asked type, else in that of the reference's file."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(like.dtype if dtype is None else dtype)


def _state_at(path: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_dir():
        return load_state(path)
    checkpoint = Checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


def _loaded(network: nn.Module, state: dict[str, torch.Tensor], path: str) -> nn.Module:
    check_same_architecture(state_of(network, "network"), state, "network", path)
    check_finite(state, path)
    model = copy_module(network)
    model.load_state_dict(state)
    return model.eval()


def _network_of(recipe: Recipe) -> tuple[nn.Module, Any]:
    assert recipe.network is not None
    network, example = network_from(recipe.network, "network")
    if recipe.input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(*recipe.input_shape, generator=generator, device="cpu")
    if example is None and recipe.align is not None:
        raise ValueError("input_shape: needed unless 'network' returns (network, inputs)")
    return network, example


def _loader_of(step: Step | None, key: str) -> Iterable[Any] | None:
    """Return the loader that a step names; None for a step without data, or no step."""
    return None if step is None or step.data is None else loader_from(step.data, f"{key}.data")


def _matcher_of(recipe: Recipe) -> Matcher | None:
    """Return the matcher of a recipe, with its data; None for models that are aligned already."""
    step = recipe.align
    if step is None:
        return None
    data = _loader_of(step, "align")
    return MATCHERS[step.word](**({} if data is None else {"data": data}), **step.options)
