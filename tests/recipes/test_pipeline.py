"""Recipes that are run: the output is what the library's own calls make, and describes itself."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.main import main
from fastmatch.recipes.recipe import MATCHERS, read_recipe
from helpers.examples import namespace, prepare


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A folder with three checkpoints, and a module that builds the network and the data."""
    found = namespace()
    monkeypatch.chdir(tmp_path)
    for letter in "abc":
        save_state(found[f"model_{letter}"].state_dict(), f"{letter}.safetensors")
    module = types.ModuleType("recipe_module")
    module.build = lambda: (found["model_c"], found["x"])
    module.build_alone = lambda: found["model_c"]
    module.loader = lambda: found["loader"]
    module.test_loader = lambda: found["test_loader"]
    module.stream = lambda: iter(found["loader"])
    monkeypatch.setitem(sys.modules, "recipe_module", module)
    return found


RECIPE = {
    "models": [{"model": "a.safetensors", "parameters": {"weight": 1}}, {"model": "b.safetensors", "parameters": {"weight": 3}}],
    "network": "recipe_module:build",
    "align": {"matcher": "activations", "data": "recipe_module:loader"},
    "renormalize": {"method": "repair", "data": "recipe_module:loader"},
    "evaluate": {"data": "recipe_module:test_loader", "points": 3},
    "out": "merged.safetensors",
}  # fmt: skip


def test_a_recipe_does_what_the_calls_do(names):
    outcome = fm.pipeline(RECIPE)
    a, b, data = names["model_a"], names["model_b"], names["loader"]
    aligned = fm.align(a, b, names["x"], fm.ActivationMatching(data)).apply(b)
    merged = fm.merge([a, aligned], [0.25, 0.75])
    expected = fm.renormalize(merged, [a, aligned], data, "repair").state_dict()
    found = load_state("merged.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    score = fm.score(outcome.model, names["test_loader"])
    tiles = {tile.label: tile.value for tile in outcome.report.tiles}
    assert tiles["Loss"] == f"{score.loss:.3g}"
    assert {"Loss barrier", "Units moved", "Variance left"} <= tiles.keys()
    page = Path("merged.report.html").read_text()
    assert "recipe_module:build" in page
    card = Path("merged.card.md").read_text()
    assert card.startswith("---\n")
    assert "aligned by activations to `a.safetensors`" in card
    assert f"| {score.loss:.3g} |" in card


@pytest.mark.parametrize(("word", "options"), [
    ("weights", {"balance": True}), ("fisher", {"labels": "sampled", "samples": 16, "seed": 3}),
])  # fmt: skip
def test_options_of_the_matcher_reach_it(names, word, options):
    data = {} if word == "weights" else {"data": "recipe_module:loader"}
    align = {"matcher": word, **data, **options}
    outcome = fm.pipeline(
        {"models": RECIPE["models"], "network": RECIPE["network"], "align": align, "out": "m.safetensors"}
    )
    matcher = MATCHERS[word](**({"data": names["loader"]} if data else {}), **options)
    expected = fm.align(names["model_a"], names["model_b"], names["x"], matcher)
    (found,) = outcome.alignments
    assert found.matching is not None
    assert expected.matching is not None
    assert found.matching.objective == expected.matching.objective
    assert all(torch.equal(found.permutations[k], v) for k, v in expected.permutations.items())


def test_the_recipe_beside_the_output_repeats_the_run(names):
    fm.pipeline(RECIPE)
    first = load_state("merged.safetensors")
    assert read_recipe("merged.recipe.yaml").given == RECIPE
    fm.pipeline("merged.recipe.yaml", "again.pt")
    again = load_state("again.pt")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_three_models_and_another_type(names):
    recipe = {
        "models": ["a.safetensors", "b.safetensors", "c.safetensors"], "base_model": "b.safetensors",
        "network": "recipe_module:build", "dtype": "bfloat16", "out": "three.pt",
    }  # fmt: skip
    outcome = fm.pipeline(recipe)
    assert len(outcome.alignments) == 2
    found = load_state("three.pt")
    assert found["0.weight"].dtype == torch.bfloat16
    models = [names[f"model_{letter}"] for letter in "abc"]
    aligned = [fm.align(models[1], models[k], names["x"]).apply(models[k]) for k in (0, 2)]
    expected = fm.merge([aligned[0], models[1], aligned[1]]).state_dict()
    torch.testing.assert_close(found["0.weight"].float(), expected["0.weight"], rtol=1e-2, atol=1e-2)


def test_models_that_are_aligned_already_are_only_merged(names):
    outcome = fm.pipeline(
        {**RECIPE, "align": False, "renormalize": None, "network": "recipe_module:build_alone"}
    )
    assert outcome.alignments == ()
    expected = fm.merge([names["model_a"], names["model_b"]], [0.25, 0.75]).state_dict()
    found = load_state("merged.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_directories_are_merged_tensor_by_tensor(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "model-a model-b")
    Path("recipe.yaml").write_text(
        "models: [model-a, model-b]\nmerge_method: linear\nparameters: {weight: 1.0}\n"
    )
    assert main(["pipeline", "recipe.yaml", "--out", "merged"]) == 0
    assert main(["align", "model-a", "model-b", "--out", "expected", "--merge", "0.5"]) == 0
    assert Path("merged/model.safetensors").read_bytes() == Path("expected/model.safetensors").read_bytes()
    for name in ("recipe.yaml", "README.md", "report.html", "config.json"):
        assert (Path("merged") / name).is_file()
    assert "Merge of 2 networks" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:renormalize leaves these alone")
@pytest.mark.parametrize("align", [None, "weights"])
def test_a_directory_has_no_place_for_biases_that_its_architecture_lacks(tmp_path, monkeypatch, align):
    """With an alignment, which reads all layers, this is known before it."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "model-a model-b")
    model = transformers.AutoModelForCausalLM.from_pretrained("model-a")
    tokens = torch.randint(0, model.config.vocab_size, (8, 6))
    module = types.ModuleType("causal")
    module.build, module.loader = lambda: (model, {"input_ids": tokens[:2]}), lambda: [{"input_ids": tokens}]
    monkeypatch.setitem(sys.modules, "causal", module)
    monkeypatch.setattr("fastmatch.recipes.pipeline.align", lambda *_, **__: pytest.fail("it is aligned"))
    recipe = {"models": ["model-a", "model-b"], "network": "causal:build", "out": "merged", "align": align}
    given = {"method": "repair", "data": "causal:loader"}
    with pytest.raises(
        ValueError, match=r"renormalize: it needs the new parameter '.*bias', for which the architecture"
    ):
        fm.pipeline({**recipe, "renormalize": given})
    assert not Path("merged").exists()


def test_the_card_is_one_of_the_hub_and_names_the_models_and_the_recipe(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, "model-a model-b")
    cached = Path("cache/models--some-org--model-a/snapshots/0123abc")
    cached.parent.mkdir(parents=True)
    Path("model-a").rename(cached)
    fm.pipeline({"models": [str(cached), "model-b"]}, "merged")
    card = huggingface_hub.ModelCard.load("merged/README.md")
    assert card.data.base_model == ["some-org/model-a"]
    assert card.data.tags == ["merge", "fastmatch"]
    written = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert written == read_recipe("merged/recipe.yaml").given


@pytest.mark.parametrize(("change", "message"), [
    ({"network": None}, "network: needed unless all models are directories"),
    ({"network": "recipe_module:nothing"}, "network: 'recipe_module' has no callable 'nothing'"),
    ({"network": "no_such_module:build"}, "network: no module 'no_such_module' in this folder or installed"),
    ({"network": "./no_such_file.py:build"}, "network: no file ./no_such_file.py"),
    ({"network": "recipe_module:loader"}, "network: recipe_module:loader returned list"),
    ({"network": "recipe_module:build_alone"}, "input_shape: needed"),
    ({"evaluate": {"data": "recipe_module:stream"}}, "evaluate.data: expected a callable that returns a loader"),
    ({"models": ["a.safetensors", "none.pt"]}, "no file or directory none.pt"),
    ({"out": "merged.txt"}, "out: expected a file ending in"),
    ({"out": "nowhere/merged.pt"}, "nowhere is not a folder"),
    ({"out": "a.safetensors"}, "a.safetensors"),
])  # fmt: skip
def test_what_cannot_be_done_leaves_nothing_behind(names, change, message):
    before = sorted(Path.cwd().iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        fm.pipeline({**RECIPE, **change})
    assert sorted(Path.cwd().iterdir()) == before


def test_outputs_are_not_replaced_without_force(names):
    fm.pipeline(RECIPE)
    with pytest.raises(FileExistsError, match="--force"):
        fm.pipeline(RECIPE)
    fm.pipeline(RECIPE, force=True)


def test_functions_may_be_in_a_file_of_any_folder(names):
    Path("parts").mkdir()
    Path("parts/sizes_of_mine.py").write_text("WIDTH = 3\n")
    Path("parts/net_of_mine.py").write_text(
        "import torch\nfrom sizes_of_mine import WIDTH\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Linear(2, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 2)),"
        " torch.zeros(1, 2)\n"
    )
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    for path in ("small.pt", "same.pt"):
        save_state(net.state_dict(), path)
    recipe = {"models": ["small.pt", "same.pt"], "network": "parts/net_of_mine.py:build", "out": "out.pt"}
    fm.pipeline(recipe)
    torch.testing.assert_close(load_state("out.pt"), dict(net.state_dict()))
    for module in ("sizes_of_mine", "net_of_mine"):
        sys.modules.pop(module, None)


def test_weights_that_the_type_of_the_output_cannot_hold_are_not_written(names):
    state = load_state("a.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim > 1)
    state[name].view(-1)[0] = 2e5
    save_state(state, "large.safetensors")
    recipe = {
        "models": ["large.safetensors", "a.safetensors"],
        "network": "recipe_module:build",
        "align": False,
        "out": "out.pt",
    }
    before = sorted(Path.cwd().iterdir())
    with pytest.raises(
        ValueError, match=f"out.pt is not written: the result: tensor '{name}' holds 1 NaN or infinite"
    ):
        fm.pipeline({**recipe, "dtype": "float16"})
    assert sorted(Path.cwd().iterdir()) == before
    assert fm.pipeline({**recipe, "dtype": "bfloat16"}).files["model"].is_file()


def test_a_name_of_the_package_is_the_function():
    import fastmatch.recipes.pipeline  # noqa: F401

    assert callable(fm.pipeline)
