"""Files of networks inside other modules, as Lightning and torch.compile write them: a prefix is before every name."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch._internal.states import prefix_before
from fastmatch.checkpoint import align_checkpoints, tracing
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build", "--input-shape", "2,6"]
DATA = ["--data", "cli_module:loader"]


def save_as_lightning(state, path, prefix="model."):
    """Write a file with the entries of Lightning 2: of the trainer, a callback, the optimizer, and hyperparameters."""
    scores = {"monitor": "val_loss", "best_model_score": torch.tensor(0.5), "best_k_models": {}}
    held = {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.6.0",
        "state_dict": {prefix + name: tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss'}": scores},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1, "name": "a"},
        "current_model_state": {f"{prefix}{name}": torch.zeros_like(tensor) for name, tensor in state.items()},
        "averaging_state": {"n_averaged": torch.tensor(4)},
    }  # fmt: skip
    torch.save(held, path)


@pytest.fixture(params=["model.", "net.", "_orig_mod.", "module.model."])
def wrapped(request, folder):
    """(prefix, spec, planted): checkpoints a and b in the format of Lightning, b a with its units moved; and a plain one of a."""
    model = build_model("cli_module:build")[0]
    spec = fm.PermutationSpec.trace(model, torch.zeros(2, 6))
    planted = fm.Alignment(spec.random(), spec)
    save_state(model.state_dict(), "plain.pt")
    save_as_lightning(model.state_dict(), "a.ckpt", request.param)
    save_as_lightning(planted.apply(model.state_dict()), "b.ckpt", request.param)
    return request.param, spec, planted


def same(path, other):
    found, expected = load_state(path), load_state(other)
    return found.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in found.items())


@pytest.mark.parametrize("where", [[], ["--out-of-core"]])
def test_align_takes_the_prefix_off_and_writes_it_again(wrapped, where):
    assert main(["align", "a.ckpt", "b.ckpt", *MODEL, *where, "--out", "out.ckpt"]) == 0
    assert same("out.ckpt", "a.ckpt")


def test_a_reference_without_the_prefix_and_a_checkpoint_with_it(wrapped):
    prefix, _, _ = wrapped
    assert main(["align", "plain.pt", "b.ckpt", *MODEL, "--out", "out.ckpt"]) == 0
    assert same("out.ckpt", "a.ckpt")
    assert all(name.startswith(prefix) for name in load_state("out.ckpt"))


@pytest.mark.parametrize("paths", [("plain.pt", "b.ckpt"), ("a.ckpt", "plain_b.pt")])
def test_on_disk_a_prefix_of_one_side_does_not_count(wrapped, paths, caplog):
    """The output has the names that it has anyway: of B aligned, and of the first that is merged."""
    _, _, planted = wrapped
    save_state(planted.apply(load_state("plain.pt")), "plain_b.pt")
    align = ["align", *paths, *MODEL, "--out-of-core", "--out", "aligned.pt", "--report", "page.html"]
    assert main(align) == 0
    like_b = "a.ckpt" if paths[1] == "b.ckpt" else "plain.pt"
    assert same("aligned.pt", like_b)
    half = ["align", *paths, *MODEL, "--out-of-core", "--merge", "0.5", "--out", "half.pt"]
    assert main(half) == 0
    assert same("half.pt", like_b)
    assert main(["merge", paths[0], "aligned.pt", "--out", "merged.pt"]) == 0
    assert same("merged.pt", paths[0])
    assert main(["verify", *paths, *MODEL]) == 0
    assert [r.message.partition(": ")[2][:10] for r in caplog.records] == ["the prefix"] * 4


def test_the_prefix_of_each_side_is_looked_for_once(wrapped, monkeypatch):
    asked = []
    monkeypatch.setattr(tracing, "prefix_before", lambda *pair: asked.append(pair) or prefix_before(*pair))
    assert main(["verify", "plain.pt", "b.ckpt", *MODEL]) == 0
    assert len(asked) == 2


def test_a_shell_takes_the_network_out_of_a_module_that_holds_more(wrapped, capfd):
    save_state({**load_state("b.ckpt"), "criterion.weight": torch.ones(7)}, "more $x.pt")
    for command in (
        ["align", "plain.pt", "more $x.pt", *MODEL, "--out-of-core", "--out", "out.pt"],
        ["align", "plain.pt", "more $x.pt", *MODEL, "--out", "out.pt"],
        ["merge", "plain.pt", "more $x.pt", "--out", "out.pt"],
    ):
        assert main(command) == 2
        line = capfd.readouterr().err.partition("without it: ")[2]
        python, _, code = shlex.split(line)
        assert python == "python"
        exec(code, {})
        assert main(["align", "plain.pt", "more $x_plain.pt", *MODEL, "--out", "out.pt"]) == 0
        assert same("out.pt", "plain.pt")
        Path("out.pt").unlink()
        Path("more $x_plain.pt").unlink()


def test_a_directory_of_a_model_with_a_head_is_led_to_one_without(tmp_path, monkeypatch, capfd):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(num_attention_heads=2, **sizes)
    headed, bare = transformers.LlamaForCausalLM(config), transformers.LlamaModel(config)
    headed.save_pretrained("headed")
    bare.save_pretrained("bare")
    assert main(["align", "headed", "bare", "--out", "out"]) == 2
    line = capfd.readouterr().err.partition("the one without: ")[2]
    python, _, code = shlex.split(line)
    assert python == "python"
    exec(code, {})
    assert main(["align", "headed_base", "bare", "--out", "out"]) == 0


@pytest.mark.filterwarnings("ignore:renormalize leaves these alone")
@pytest.mark.parametrize("command", [
    ["merge", "a.ckpt", "plain.pt"],
    ["align-many", "a.ckpt", "b.ckpt", "--input-shape", "2,6"],
    ["renormalize", "a.ckpt", *DATA, "--method", "rescale", "--endpoints", "a.ckpt", "plain.pt", "--weights", "0.5", "0.5"],
])  # fmt: skip
def test_the_other_commands_keep_the_names_too(wrapped, command):
    assert main([*command, *MODEL[:2], "--out", "out.ckpt"]) == 0
    assert load_state("out.ckpt").keys() == load_state("a.ckpt").keys()


def test_a_recipe_reads_them(wrapped):
    recipe = {
        "models": ["a.ckpt", "b.ckpt"],
        "network": "cli_module:build_with_inputs",
        "align": "weights",
        "out": "out.ckpt",
    }
    fm.pipeline(recipe)
    found, expected = load_state("out.ckpt"), load_state("a.ckpt")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


def test_what_else_the_module_holds_is_told_and_not_dropped(wrapped, refused):
    prefix, spec, _ = wrapped
    state = load_state("b.ckpt")
    save_state(
        {**state, "criterion.weight": torch.ones(7), "ema.0.weight": state[f"{prefix}0.weight"]}, "more.pt"
    )
    told = f"more.pt: has the names of the other with the prefix '{prefix}' (besides 'criterion.weight' (also 'ema.0.weight'; 2 in all)"
    for where in ([], ["--out-of-core"]):
        refused(["align", "more.pt", "more.pt", *MODEL, *where, "--out", "out.pt"], told)
    with pytest.raises(ValueError, match=r"besides 'criterion\.weight'"):
        align_checkpoints("more.pt", "more.pt", "out.pt", spec=spec)


def test_tied_parameters_that_are_saved_once_inside_of_a_module(folder):
    model = build_model("cli_module:build_tied")[0]
    state = {k: v for k, v in nn.ModuleDict({"net": model}).state_dict().items() if k != "net.second.weight"}
    save_state(state, "a.safetensors")
    command = [
        "merge",
        "a.safetensors",
        "a.safetensors",
        "--model",
        "cli_module:build_tied",
        "--out",
        "out.safetensors",
    ]
    assert main(command) == 0
    assert same("out.safetensors", "a.safetensors")
