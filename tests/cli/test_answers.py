"""What a command answers: inputs that are missing or would be lost, the words of a summary, the exit status."""

from __future__ import annotations

import json

import pytest

from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build_with_inputs"]
PAIR = ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("lost", PAIR)
def test_no_output_replaces_an_input(planted, refused, lost, force):
    before = (planted / lost).read_bytes()
    refused(["align", *PAIR, *MODEL, "--out", lost, *force], f"--out: {lost} is one of the inputs")
    refused(["merge", *PAIR, *MODEL, "--out", lost, *force], f"--out: {lost} is one of the inputs")
    assert (planted / lost).read_bytes() == before


def test_a_path_that_does_not_exist_is_named(planted, refused):
    refused(["align", "a.safetensors", "nowhere", "--out", "o"], "nowhere: no such file or folder")
    refused(["inspect", "nowhere"], "nowhere: no such file or folder")
    refused(["distances", "a.safetensors", "nowhere"], "nowhere: no such file or folder")


def test_names_that_hold_commands_of_a_terminal_are_printed_as_text(planted, refused, capsys):
    refused(["inspect", "\x1b[2Jnowhere"], r"\x1b[2Jnowhere: no such file or folder")
    state = load_state("a.safetensors")
    save_state({**state, "\x1b[2Jmore": next(iter(state.values()))}, "more.safetensors")
    main(["distances", "a.safetensors", "more.safetensors"])
    main(["align", "more.safetensors", "b.safetensors", *MODEL, "--out", "o.safetensors"])
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    assert r"\x1b[2Jmore" in told.out + told.err


@pytest.mark.parametrize("weight", ["-0.1", "1.5", "nan"])
def test_a_merge_lies_between_its_ends(planted, refused, weight):
    refused(["align", *PAIR, *MODEL, f"--merge={weight}", "--out", "o.safetensors"], "--merge: expected")


def test_a_summary_says_what_was_written(planted, capsys):
    assert main(["align", *PAIR, *MODEL, "--merge", "0.25", "--out", "m.safetensors"]) == 0
    assert "wrote the merge 0.75 A + 0.25 B to m.safetensors" in capsys.readouterr().out
    command = ["align", *PAIR, *MODEL, "--out-of-core", "--dtype", "bfloat16", "--out", "h.safetensors"]
    assert main(command) == 0
    assert "wrote h.safetensors in bfloat16" in capsys.readouterr().out


def test_distances_are_printed_without_a_file(planted, capsys):
    assert main(["distances", *PAIR]) == 0
    printed = capsys.readouterr().out
    assert "a.safetensors" in printed
    assert "wrote" not in printed


def test_verify_has_a_status_of_its_own_for_another_function(planted, capsys):
    from safetensors.torch import save_file

    state = load_state("b.safetensors")
    name = next(iter(state))
    save_file({**state, name: state[name] * 1.5}, "other.safetensors")
    assert main(["verify", "b.safetensors", "other.safetensors", *MODEL]) == 3
    assert "is not the same function" in capsys.readouterr().err
    assert main(["verify", "b.safetensors", "other.safetensors", *MODEL, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert 0 < found["error"] < float("inf")
    assert "is not the same function" in found["reason"]
    save_file({k: t.half() for k, t in state.items()}, "half.safetensors")
    assert main(["verify", "b.safetensors", "half.safetensors", *MODEL]) == 3
    assert (
        "They are of float32 and of float16, whose rounding alone makes outputs differ by some 1e-03"
        in capsys.readouterr().err
    )
    assert main(["verify", "b.safetensors", "half.safetensors", *MODEL, "--tolerance", "1e-2"]) == 0
    assert main(["verify", "b.safetensors", "nowhere.safetensors", *MODEL]) == 2
    assert main(["verify", "b.safetensors", "b.safetensors", *MODEL]) == 0
    assert "1 output agrees" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["6", "3,7"])
def test_an_input_shape_that_the_network_does_not_take_is_named(planted, refused, shape):
    network = ["--model", "cli_module:build_normed", "--input-shape", shape]
    save_state(build_model(network[1])[0].state_dict(), "n.safetensors")
    for line in (
        ["inspect"],
        ["verify", *["n.safetensors"] * 2],
        ["align", *["n.safetensors"] * 2, "--out", "o.safetensors"],
    ):
        refused([*line, *network], "--input-shape: the model does not run on them (")


def test_renormalize_asks_for_the_weights_of_the_merge(planted, refused):
    data = ["--data", "cli_module:loader", "--out", "r.safetensors"]
    refused(
        ["renormalize", "a.safetensors", "--endpoints", *PAIR, *MODEL, *data],
        "--weights: needed for 2 endpoints, the coefficients of the merge, such as 0.5 0.5",
    )


def test_inspect_takes_a_network_or_a_directory(planted, refused):
    refused(["inspect"], "--model: give a network, or a directory")
    refused(
        ["inspect", "a.safetensors", *MODEL],
        "--model: gives the network, whose groups are the same for all of its files; leave out a.safetensors",
    )
    refused(
        ["inspect", "a.safetensors"],
        "--model: needed in the place of a.safetensors, which is not a directory with a config.json; such as: fastmatch inspect --model",
    )
    assert main(["inspect", *MODEL]) == 0  # what both lead to
