"""The model card of an output: what it was made of, how, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastmatch.recipes.recipe import Recipe, as_text
from fastmatch.report.report import Report

__all__ = ["model_card"]


def model_card(recipe: Recipe, report: Report) -> str:
    """Return the card as Markdown with metadata, as the Hugging Face hub reads it."""
    names = ", ".join(f"`{path}`" for path in recipe.models)
    steps = [
        f"aligned by {recipe.align.word} to `{recipe.models[recipe.reference]}`"
        if recipe.align
        else "taken as aligned",
        "averaged with weights " + ", ".join(f"{weight:.4g}" for weight in recipe.weights),
    ]
    if recipe.renormalize is not None:
        steps.append(f"renormalized ({recipe.renormalize.word})")
    rows = [
        f"| {tile.label} | {tile.before or '-'} | {tile.value} | {tile.note} |".replace("\n", " ")
        for tile in report.tiles
    ]
    versions = ", ".join(f"{name} {report.recipe[name]}" for name in ("fastmatch", "torch", "Python"))
    return "\n".join([
        "---", _metadata(recipe).strip(), "---", "",
        f"# {recipe.out.name}", "",
        f"A merge of {names}: {', '.join(steps)}.", "",
        "## What was measured", "", "| | before | after | |", "|---|---|---|---|", *rows, "",
        "## Recipe", "", "```yaml", as_text(recipe.given).strip(), "```", "",
        f"Made with {versions}. Licences of the merged models apply to the merge.", "",
    ])  # fmt: skip


def _metadata(recipe: Recipe) -> str:
    """Return the metadata as YAML, checked by huggingface_hub where that is installed."""
    bases = [name for name in map(_name_on_the_hub, recipe.models) if name is not None]
    given: dict[str, Any] = {"tags": ["merge", "fastmatch"], **({"base_model": bases} if bases else {})}
    try:
        from huggingface_hub import ModelCardData
    except ImportError:
        return "\n".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
    return ModelCardData(**given).to_yaml()


def _name_on_the_hub(path: str) -> str | None:
    """Return what the hub calls a model in its cache, whose folders are named so; None for another."""
    folders = [part for part in Path(path).absolute().parts if part.startswith("models--")]
    return folders[-1].removeprefix("models--").replace("--", "/") if folders else None
