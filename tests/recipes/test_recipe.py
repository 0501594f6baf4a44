"""Recipes: keys that mean the same as mergekit's are read, and what is not known is refused by name."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from fastmatch.recipes.recipe import MATCHERS, PYTHON_ONLY, as_text, read_recipe

LINEAR = """
models:
  - model: first
    parameters:
      weight: 3
  - model: second
merge_method: linear
base_model: second
dtype: bfloat16
"""

OWN = {"models": ["a.pt", "b.pt"], "network": "m:build", "out": "c.pt"}


def test_a_linear_recipe_of_mergekit_is_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LINEAR)
    found = read_recipe(path, "out")
    assert found.models == ("first", "second")
    assert found.weights == (0.75, 0.25)
    assert found.reference == 1
    assert found.dtype == torch.bfloat16
    assert found.align is not None
    assert found.align.word == "weights"
    assert str(found.out) == found.given["out"] == "out"


def test_weights_are_normalized_unless_the_recipe_says_no():
    models = [{"model": "a.pt", "parameters": {"weight": 2}}, "b.pt"]
    assert read_recipe({**OWN, "models": models}).weights == pytest.approx((2 / 3, 1 / 3))
    kept = read_recipe({**OWN, "models": models, "parameters": {"normalize": False, "weight": 0.5}})
    assert kept.weights == (2.0, 0.5)


def test_what_is_written_is_read_again(tmp_path):
    given = {
        **OWN,
        "align": {"matcher": "activations", "data": "m:data"},
        "renormalize": {"method": "reset", "data": "m:d"},
    }
    first = read_recipe(given)
    for name, text in (("r.yaml", as_text(first.given)), ("r.json", json.dumps(first.given))):
        (tmp_path / name).write_text(text)
        assert read_recipe(tmp_path / name) == first


@pytest.mark.parametrize(("change", "message"), [
    ({"merge_method": "slerp"}, "merge_method: expected 'linear', a weighted average; 'slerp'"),
    ({"slices": []}, "slices: layers of several models are not stacked here"),
    ({"tokenizer_source": "union"}, "tokenizer_source: the output has the tokenizer of the reference"),
    ({"renormalise": "repair"}, "renormalise: unknown key; did you mean 'renormalize'"),
    ({"models": ["a.pt"]}, "models: expected a list of at least two"),
    ({"models": ["a.pt", "a.pt"]}, "models: the same model twice"),
    ({"models": ["a.pt", {"model": "b.pt", "parameters": {"density": 0.5}}]}, r"models\[1\].parameters.density: unknown"),
    ({"models": ["a.pt", {"model": "b.pt", "parameters": {"weight": [0, 1]}}]}, "weights by layer are not done here"),
    ({"models": ["a.pt", {"parameters": {}}]}, r"models\[1\].model: expected a path"),
    ({"parameters": {"normalise": True}}, "parameters.normalise: unknown key; did you mean 'normalize'"),
    ({"parameters": {"normalize": 1}}, "parameters.normalize: expected true or false"),
    ({"parameters": {"weight": 0}}, "the sum of the weights: expected a finite number above 0"),
    ({"base_model": "c.pt"}, "base_model: expected one of the models"),
    ({"out": None}, "out: expected the file or directory"),
    ({"dtype": "int8"}, "dtype: expected a floating point type"),
    ({"biases": "drop"}, "biases: expected one of"),
    ({"network": "build"}, "network: expected module:callable"),
    ({"input_shape": "2,3"}, "input_shape: expected whole numbers"),
    ({"align": "activations"}, "align.data: the matcher 'activations' needs a loader"),
    ({"align": {"data": "m:d"}}, "align.data: matching by weights reads no data"),
    ({"align": "mixture"}, "align.matcher: expected one of"),
    ({"align": {"similarity": "cca"}}, "align.similarity: unknown key"),
    ({"align": {"matchr": "activations"}}, "align.matchr: unknown key; did you mean 'matcher'"),
    ({"renormalize": {"methd": "repair"}}, "renormalize.methd: unknown key; did you mean 'method'"),
    ({"align": {"max_sweeps": -1}}, "max_sweeps: expected a whole number"),
    ({"align": {"matcher": "fisher", "data": "m:d", "ascent": {}}}, "align.ascent: this option is a Python object"),
    ({"align": {"matcher": "fisher", "data": "m:d", "labels": "true"}}, "labels: expected one of"),
    ({"align": {"matcher": "straight-through", "data": "m:d", "epochs": 0}}, "epochs: expected"),
    ({"renormalize": "repair"}, "renormalize.data: needed"),
    ({"renormalize": {"method": "fix", "data": "m:d"}}, "method: expected one of"),
    ({"renormalize": {"method": "reset", "data": "m:d", "layers": ["x"]}}, 'layers: method "reset"'),
    ({"evaluate": {"points": 5}}, "evaluate.data: needed"),
    ({"evaluate": {"data": "m:d", "points": 2}}, "evaluate.points: expected a whole number of at least 3"),
])  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        read_recipe({**OWN, **change})


@pytest.mark.parametrize("word", MATCHERS)
def test_every_option_of_a_matcher_is_read_or_has_a_reason(word):
    given = {"matcher": word} if word == "weights" else {"matcher": word, "data": "m:d"}
    for option in fields(MATCHERS[word]):
        if option.name == "data":
            continue
        recipe = {**OWN, "align": {**given, option.name: option.default}}
        if option.name in PYTHON_ONLY:
            with pytest.raises(ValueError, match=f"align.{option.name}: {PYTHON_ONLY[option.name][:20]}"):
                read_recipe(recipe)
        else:
            step = read_recipe(recipe).align
            assert step is not None
            assert step.options == {option.name: option.default}
    if word == "fisher":
        step = read_recipe({**OWN, "align": {**given, "labels": "sampled", "samples": 64, "seed": 3}}).align
        assert step is not None
        assert step.options == {"labels": "sampled", "samples": 64, "seed": 3}


def test_files_that_are_no_recipe_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")
    for name, text, message in [
        ("a.txt", "x", "expected a recipe ending in"),
        ("a.json", "{", "not readable as JSON"),
        ("a.yaml", "[1", r'not YAML .*in ".*a\.yaml", line 1'),
        ("b.yaml", "- 1", "expected a mapping of keys"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(tmp_path / name)
