"""``fastmatch merge`` and ``partial``, as a user runs them."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

FILES = ["a.safetensors", "b.safetensors", "c.pt"]
MERGE = ["merge", *FILES, "--model", "cli_module:build"]
PARTIAL = [
    "partial",
    "a.safetensors",
    "b.safetensors",
    "--model",
    "cli_module:build_normed",
    "--input-shape",
    "2,6",
]
DATA = ["--data", "cli_module:loader"]


@pytest.mark.parametrize("biases", ["average", "normalize", "remove"])
def test_merge(models, biases):
    weights = ["--weights", "0.5", "0.25", "0.25"]
    assert main([*MERGE, *weights, "--biases", biases, "--out", "m.safetensors"]) == 0
    alphas = [0.5, 0.25, 0.25]
    expected = {
        "average": lambda: fm.merge(models, alphas),
        "normalize": lambda: fm.merge(models, alphas, biases="normalize"),
        "remove": lambda: fm.remove_biases(fm.merge(models, alphas)),
    }[biases]()
    found = load_state("m.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.state_dict().items())


@pytest.mark.parametrize(("extra", "message"), [
    (["--out", "a.safetensors"], "a.safetensors is one of the inputs"),
    (["--out", "m.npz"], "--out"),
    (["--weights", "1", "--out", "m.pt"], "--weights: expected 3"),
])  # fmt: skip
def test_bad_input_of_merge_is_one_line(models, refused, extra, message):
    refused([*MERGE, *extra], message)


@pytest.fixture
def normed(folder):
    """Two random networks with batch norm, saved as a.safetensors and b.safetensors."""
    pair = [build_model("cli_module:build_normed")[0].eval() for _ in range(2)]
    for name, model in zip("ab", pair, strict=True):
        save_state(model.state_dict(), f"{name}.safetensors")
    return pair


@pytest.mark.parametrize("method", [None, "repair", "reset"])
def test_partial_writes_a_program_that_computes_what_the_library_makes(normed, loader, method, capsys):
    options = ["--rule", "zip", "--start-at", "3", "--weights", "0.25", "0.75", "--out", "merged.pt2"]
    assert main([*PARTIAL, *DATA, *options, *(["--renormalize", method] if method else [])]) == 0
    rule = fm.Zip(loader)
    found = fm.merge_partial(normed, torch.zeros(2, 6), rule, start_at="3", weights=[0.25, 0.75])
    expected: torch.nn.Module = found.model
    if method is not None:
        endpoints = found.endpoint_statistics(normed, loader)
        expected = fm.renormalize(found.model, endpoints, loader, method, weights=[0.25, 0.75])
    program = torch.export.load("merged.pt2").module()
    x = torch.randn(11, 6)  # another batch size than the example's
    with torch.no_grad():
        torch.testing.assert_close(program(x), expected(x))
    ratio = fm.model_cost(found.model, x).flops / fm.model_cost(normed[0], x).flops
    said = capsys.readouterr().out
    assert "1 of 2 groups merged by zip" in said  # the first is at the boundary: its layers stay apart
    assert f"{ratio:.2f} times the FLOPs; wrote merged.pt2" in said
    assert main([*PARTIAL, *DATA, *options]) == 2
    assert "--force" in capsys.readouterr().err


def test_partial_of_networks_of_different_tasks_shares_a_trunk_and_returns_both_outputs(
    folder, loader, capsys
):
    names = ["build", "build_five"]
    pair = [build_model(f"cli_module:{name}")[0].eval() for name in names]
    for name, model in zip("ab", pair, strict=True):
        save_state(model.state_dict(), f"{name}.safetensors")
    options = ["--rule", "zip", "--stop-at", "2", "--out", "shared.pt2"]
    own = [part for name in names for part in ("--model", f"cli_module:{name}")]
    assert (
        main(["partial", "a.safetensors", "b.safetensors", *own, "--input-shape", "2,6", *DATA, *options])
        == 0
    )
    assert "2 of 2 groups merged by zip" in capsys.readouterr().out
    expected = fm.merge_partial(pair, torch.zeros(2, 6), fm.Zip(loader), stop_at="2").model
    x = torch.randn(9, 6)
    with torch.no_grad():
        found = torch.export.load("shared.pt2").module()(x)
        assert [tuple(y.shape) for y in found] == [(9, 7), (9, 5)]
        torch.testing.assert_close(tuple(found), tuple(expected(x)))


@pytest.mark.parametrize(("arguments", "message"), [
    ([*PARTIAL, *DATA, "--stop-at", "9", "--out", "new.pt2"], "--stop-at: unknown group '9'"),
    ([*PARTIAL, *["--model", "cli_module:build"] * 2, *DATA, "--out", "new.pt2"], "--model: expected one, or one for each of the 2 checkpoints; got 3"),
    ([*PARTIAL, "--out", "new.pt2"], "--data: needed by --rule permute"),
    ([*PARTIAL, *DATA, "--out", "new.pt"], "expected a file ending in"),
    ([*PARTIAL, *DATA, "--keep", "9", "--out", "new.pt2"], "--keep: expected a position of 0 to 2"),
    ([*PARTIAL, *DATA, "--start-at", "9", "--out", "new.pt2"], "--start-at: unknown group '9'"),
    ([*PARTIAL, *DATA, "--apart", "9", "--out", "new.pt2"], "--apart: unknown group '9'"),
    ([*PARTIAL, "--rule", "identity", "--renormalize", "reset", "--out", "new.pt2"], "--data: needed by --renormalize reset"),
    ([*PARTIAL, *DATA, "--rule", "identity", "--out", "new.pt2"], "--data: --rule identity reads none"),
    ([*PARTIAL[:2], *PARTIAL[3:], *DATA, "--out", "new.pt2"], "checkpoints: expected at least two, got 1"),
])  # fmt: skip
def test_bad_input_of_partial_is_one_line(normed, refused, arguments, message):
    refused(arguments, message)
