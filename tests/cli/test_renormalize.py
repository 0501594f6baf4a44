"""``fastmatch renormalize``, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build"]
DATA = ["--data", "cli_module:loader"]
ENDPOINTS = ["--endpoints", "a.safetensors", "b.safetensors"]
RENORMALIZE = ["renormalize", "merged.pt", *ENDPOINTS, *MODEL, *DATA]


@pytest.fixture
def merged(models):
    """The first two models; their merge is merged.pt."""
    save_state(fm.merge(models[:2], [0.25, 0.75]).state_dict(), "merged.pt")
    return models[:2]


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_renormalize_writes_what_the_library_makes(merged, loader, mode, capsys):
    options = ["--weights", "0.25", "0.75", "--method", "repair", "--mode", mode, "--samples", "50"]
    assert main([*RENORMALIZE, *options, "--out", "new.safetensors"]) == 0
    assert "repair: as asked; 3 layers" in capsys.readouterr().out
    method = fm.Renormalization("repair", mode, 50)
    expected = fm.renormalize(fm.merge(merged, [0.25, 0.75]), merged, loader, method)
    for name, tensor in load_state("new.safetensors").items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_biases_that_a_network_had_not_are_named(merged, folder, capfd, caplog):
    """A layer has none before a batch norm; what REPAIR writes does not fit the network then."""
    model = ["--model", "cli_module:build_without_bias"]
    network = build_model(model[1])[0].eval()
    for path in ("d.pt", "e.pt"):
        save_state(network.state_dict(), path)
    line = ["renormalize", "d.pt", "--endpoints", "e.pt", *model, *DATA, "--out"]
    assert main([*line, "rescaled.pt", "--method", "rescale"]) == 0
    assert "new:" not in capfd.readouterr().out
    assert main([*line, "new.pt", "--method", "repair"]) == 0
    assert "new: 0.bias; a network needs these biases to load the result" in capfd.readouterr().out
    assert load_state("new.pt").keys() - network.state_dict().keys() == {"0.bias"}
    recipe = {
        "models": ["d.pt", "e.pt"], "network": model[1], "renormalize": {"method": "repair", "data": DATA[1]}, "out": "r.pt",
    }  # fmt: skip
    Path("r.json").write_text(json.dumps(recipe))
    assert main(["pipeline", "r.json"]) == 0
    assert "renormalize: new: 0.bias; a network needs these biases to load the result" in caplog.text
    assert load_state("r.pt").keys() == load_state("new.pt").keys()


@pytest.mark.filterwarnings("always")
def test_a_named_method_warns_of_few_samples(merged, capsys):
    line = [*RENORMALIZE[:-1], "cli_module:two", "--weights", "0.25", "0.75", "--out", "new.pt"]
    assert main([*line, "--method", "repair"]) == 0
    told = capsys.readouterr().err
    assert '--data: 2 samples came, and "repair" brings the network to the statistics of these alone' in told
    assert "give 8 at the least" in told


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("files", "weights"), [
    (["a.safetensors", "c.pt"], ["0.25", "0.75"]),
    (["b.safetensors", "a.safetensors"], ["0.25", "0.75"]),
    (["a.safetensors", "b.safetensors"], ["0.5", "0.5"]),
])  # fmt: skip
def test_endpoints_that_were_not_merged_are_refused(merged, refused, files, weights, dtype, capsys):
    """The file before its alignment, another order, and other weights were taken, without a word."""
    for path in ("a.safetensors", "b.safetensors", "c.pt", "merged.pt"):
        save_state({name: t.to(dtype) for name, t in load_state(path).items()}, path, force=True)
    common = ["renormalize", "merged.pt", *MODEL, *DATA, "--method", "repair", "--out", "new.pt"]
    line = [*common, "--endpoints", *files, "--weights", *weights]
    told = " + ".join(f"{w} {path}" for w, path in zip(weights, files, strict=True))
    refused(
        line,
        f"--endpoints: expected the models that were merged, in their order; the merge's '0.weight' is not {told}. Give",
    )
    refused(line, "or --other-endpoints if this is meant")
    assert main([*line, "--other-endpoints"]) == 0
    assert (
        main(
            [*common, "--endpoints", "a.safetensors", "b.safetensors", "--weights", "0.25", "0.75", "--force"]
        )
        == 0
    )


@pytest.mark.parametrize(("arguments", "message"), [
    ([*RENORMALIZE, "--out", "new.pt"], "--weights: needed for 2 endpoints"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--out", "new.pt"], "--endpoints: needed"),
    ([*RENORMALIZE, "--weights", "0.5", "0.5", "--out", "new.npz"], "expected a file ending in"),
    ([*RENORMALIZE[:-1], "cli_module:stream", "--weights", "0.25", "0.75", "--out", "new.pt"], "can be read only once"),
    ([*RENORMALIZE[:-1], "cli_module:empty", "--weights", "0.25", "0.75", "--out", "new.pt"], "--data: yielded no batch; it is empty"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--method", "reset", "--out", "new.pt"], "needs batch norm"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--endpoints", "a.safetensors", "--other-endpoints", "--out", "new.pt"],
     "--other-endpoints: is for two --endpoints or more"),
    ([*RENORMALIZE, "--method", "reset", "--out", "new.pt"], "--endpoints: --method reset uses the data alone"),
    (["renormalize", "merged.pt", *MODEL, *DATA, "--method", "reset", "--weights", "1", "--out", "new.pt"],
     "--weights: --method reset uses the data alone"),
])  # fmt: skip
def test_bad_input_is_one_line(merged, refused, arguments, message):
    refused(arguments, message)
