"""``fastmatch align`` and ``align-many``, as a user runs them."""

from __future__ import annotations

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main

MODEL = ["--model", "cli_module:build_with_inputs"]
ALIGN = ["align", "a.safetensors", "b.safetensors", *MODEL, "--out"]
DATA = ["--data", "cli_module:loader"]
FILES = ["a.safetensors", "b.safetensors", "c.pt"]
MANY = ["align-many", *FILES, *MODEL]
OUTS = ["--out", "b2.safetensors", "c2.safetensors"]


def test_align_undoes_a_planted_permutation(planted, capsys):
    assert main([*ALIGN, "b_aligned.safetensors", "--permutations", "perms.safetensors"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 groups, ")
    assert said.endswith("wrote b_aligned.safetensors and perms.safetensors\n")
    a, aligned = load_state("a.safetensors"), load_state("b_aligned.safetensors")
    assert all(torch.equal(aligned[k], v) for k, v in a.items())
    moved = fm.Alignment.load("perms.safetensors").apply(load_state("b.safetensors"))
    assert all(torch.equal(moved[k], v) for k, v in a.items())


@pytest.mark.parametrize(
    "options",
    [
        ["--matcher", "activations"],
        ["--matcher", "activations", "--similarity", "cca", "--site", "pre", "--reduce", "sum"],
        ["--matcher", "fisher", "--include", "weights"],
        ["--matcher", "straight-through", "--epochs", "2", "--learning-rate", "0.02"],
        ["--matcher", "mixture", "--activation-weight", "0.3", "--similarity", "covariance", "--seed", "2"],
    ],
)
def test_align_on_data(planted, options, capsys):
    assert main([*ALIGN, "b_aligned.safetensors", *DATA, *options]) == 0
    model, _ = build_model("cli_module:build_with_inputs")
    x = torch.randn(9, 6)
    outputs = []
    for path in ("b.safetensors", "b_aligned.safetensors"):
        model.load_state_dict(load_state(path))
        outputs.append(model(x))
    assert torch.allclose(*outputs, atol=1e-5)
    if "straight-through" in options:  # by weights every unit is found, dead or alive
        a, aligned = load_state("a.safetensors"), load_state("b_aligned.safetensors")
        assert all(torch.equal(aligned[k], v) for k, v in a.items())


def test_parameters_that_the_pass_does_not_read_are_refused_unless_the_user_says_otherwise(folder, capsys):
    for path in ("a.safetensors", "b.safetensors"):
        save_state(build_model("cli_module:build_tasks")[0].state_dict(), path)
    command = [
        "align",
        "a.safetensors",
        "b.safetensors",
        "--model",
        "cli_module:build_tasks",
        "--out",
        "o.safetensors",
    ]
    assert main(command) != 0
    assert "'second.weight'" in capsys.readouterr().err
    assert main([*command, "--unread", "hold"]) != 0  # nothing is left to move
    assert main([*command, "--unread", "ignore"]) == 0
    assert "1 group, " in capsys.readouterr().out


def test_the_summary_says_whether_the_function_is_proved_to_stay(models, capsys):
    assert main([*ALIGN, "o.pt"]) == 0
    assert "proved to keep the function (error" in capsys.readouterr().out
    assert main([*ALIGN, "p.pt", "--no-verify"]) == 0
    assert "not proved to keep B's function" in capsys.readouterr().out


def test_align_writes_what_the_library_makes(models, loader):
    options = ["--matcher", "activations", "--similarity", "covariance", "--site", "pre", "--permutations"]
    assert main([*ALIGN, "o.pt", *DATA, *options, "p.safetensors"]) == 0
    matcher = fm.ActivationMatching(loader, similarity="covariance", site="pre")
    expected = fm.align(*models[:2], torch.zeros(2, 6), matcher)
    found = fm.Alignment.load("p.safetensors")
    assert all(torch.equal(found.permutations[k], p) for k, p in expected.permutations.items())


@pytest.mark.parametrize(
    ("options", "matcher"),
    [
        (["--init", "identity", "--seed", "4"], fm.WeightMatching(init="identity", seed=4)),
        (["--max-sweeps", "1", "--init", "identity"], fm.WeightMatching(init="identity", max_sweeps=1)),
        (["--tolerance", "0.5"], fm.WeightMatching(tolerance=0.5)),
        (["--include", "weights"], fm.WeightMatching(include="weights")),
        (["--balance"], fm.WeightMatching(balance=True)),
    ],
)
def test_options_of_weight_matching_are_used(models, options, matcher, capsys):
    assert main([*ALIGN, "o.pt", *options, "--permutations", "p.safetensors"]) == 0
    expected = fm.align(*models[:2], torch.zeros(2, 6), matcher)
    found = fm.Alignment.load("p.safetensors")
    assert all(torch.equal(found.permutations[k], p) for k, p in expected.permutations.items())
    assert expected.matching is not None
    state = "converged" if expected.matching.converged else "not converged, raise --max-sweeps"
    assert f"{expected.matching.solves} assignments ({state})" in capsys.readouterr().out


def test_the_summary_says_whether_training_has_lowered_the_loss(models, capsys):
    training = [*DATA, "--matcher", "straight-through", "--epochs", "1", "--learning-rate"]
    assert main([*ALIGN, "o.pt", *training, "1e-12"]) == 0
    said = capsys.readouterr().out
    assert "(no epoch lowered the loss, weight matching's result is kept)" in said
    assert "converged" not in said


def test_the_summary_names_the_limit_of_the_strategy(models, capsys):
    assert main([*MANY, *OUTS, "--max-rounds", "1"]) == 0
    assert "(not converged, raise --max-rounds)" in capsys.readouterr().out


def test_align_starts_from_a_file_of_permutations(planted, capsys):
    assert main([*ALIGN, "o.pt", "--permutations", "p.safetensors"]) == 0
    capsys.readouterr()
    assert main([*ALIGN, "again.pt", "--init", "p.safetensors"]) == 0
    objectives = capsys.readouterr().out.split("objective ")[1].split(" in ")[0].split(" -> ")
    assert objectives[0] == objectives[1]


def test_only_some_groups_move(models):
    assert main([*ALIGN, "o.pt", "--groups", "2"]) == 0
    b, aligned = load_state("b.safetensors"), load_state("o.pt")
    assert {k for k in b if not torch.equal(b[k], aligned[k])} <= {"2.weight", "2.bias", "4.weight"}
    assert not torch.equal(b["2.weight"], aligned["2.weight"])


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        (["2.hidden"], {"2"}),
        (["2*"], {"2"}),
        (["[1-9].hid*"], {"2"}),
        (["*.hidden"], {"0", "2"}),
        (["0", "2.h*"], {"0", "2"}),
    ],
)
def test_groups_are_chosen_by_what_they_are_and_by_patterns(models, patterns, moved):
    assert main([*ALIGN, "o.pt", "--permutations", "p.safetensors", "--groups", *patterns]) == 0
    assert set(fm.Alignment.load("p.safetensors").permutations) == moved


def test_merge_writes_the_average(planted):
    assert main([*ALIGN, "merged.pt", "--merge", "0.5"]) == 0
    a, merged = load_state("a.safetensors"), load_state("merged.pt")
    assert all(torch.allclose(merged[k], v) for k, v in a.items())


def test_an_existing_output_needs_force_and_is_left_alone(planted, capsys):
    (planted / "b_aligned.safetensors").write_text("mine")
    assert main([*ALIGN, "b_aligned.safetensors"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (planted / "b_aligned.safetensors").read_text() == "mine"
    assert main([*ALIGN, "b_aligned.safetensors", "--force"]) == 0
    assert load_state("b_aligned.safetensors").keys() == load_state("a.safetensors").keys()


def test_two_outputs_in_one_file_lose_nothing(planted, capsys):
    (planted / "same.safetensors").write_text("mine")
    for extra in ([], ["--force"]):
        for second in ("same.safetensors", "./same.safetensors"):
            assert main([*ALIGN, "same.safetensors", "--permutations", second, *extra]) == 2
            assert "same file as --out" in capsys.readouterr().err
    assert (planted / "same.safetensors").read_text() == "mine"


@pytest.mark.parametrize("outputs", [
    ["z.npz"], ["noext"], ["z.pt", "--permutations", "p.pt"],
])  # fmt: skip
def test_a_suffix_that_could_not_be_read_back_is_refused(planted, refused, outputs):
    refused([*ALIGN, *outputs], "expected a file ending in")


def test_weights_that_are_not_finite_are_named(planted, refused):
    state = load_state("b.safetensors")
    state["2.weight"][3] = float("nan")
    save_state(state, "nan.safetensors")
    arguments = ["align", "a.safetensors", "nan.safetensors", *ALIGN[3:], "o.pt"]
    refused(arguments, "nan.safetensors: tensor '2.weight' holds 16 NaN")


def test_checkpoints_of_another_architecture_are_named(planted, refused):
    state = load_state("b.safetensors")
    state["2.weight"] = torch.zeros(16, 15)
    save_state(state, "c.safetensors")
    arguments = ["align", "a.safetensors", "c.safetensors", *ALIGN[3:], "o.pt"]
    refused(arguments, "c.safetensors: tensor '2.weight' has shape (16, 15)")


def test_other_heads_are_led_out_of_core(planted, capsys):
    """The advice is followed: it works. Where it would not, it is not given."""
    save_state(build_model("cli_module:build_five")[0].state_dict(), "five.pt")
    line = ["align", "a.safetensors", "five.pt", "--input-shape", "2,6", "--out", "o.pt"]
    advice = "With --out-of-core{}, 4.weight and 4.bias of another size are left out and the rest is aligned"
    for builder, more in (("build", " and a --model that builds five.pt"), ("build_five", "")):
        assert main([*line, "--model", f"cli_module:{builder}"]) == 2
        assert advice.format(more) in capsys.readouterr().err
    assert main([*line, "--model", "cli_module:build", *DATA, "--matcher", "activations"]) == 2
    assert "--out-of-core" not in capsys.readouterr().err
    assert main([*line, "--model", "cli_module:build_five", "--out-of-core"]) == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["align", "a.safetensors", "none.safetensors", *ALIGN[3:], "o.pt"], "none.safetensors: no such file"),
    ([*ALIGN, "missing/out.pt"], "is not a folder"),
    # A matcher without its data, and data without a matcher that reads it.
    ([*ALIGN, "o.pt", "--matcher", "fisher"], "--data: --matcher fisher needs a loader"),
    ([*ALIGN, "o.pt", "--matcher", "mixture"], "--data: --matcher mixture needs a loader"),
    ([*ALIGN, "o.pt", *DATA], "--data: is an option of --matcher activations or fisher or straight-through or mixture"),
    ([*ALIGN, "o.pt", *DATA, "--matcher", "weights"], "--data: is an option of --matcher activations"),
    ([*ALIGN, "o.pt", "--data", "cli_module:stream", "--matcher", "activations"], "--data: expected a callable that returns a loader"),
    # Options of another matcher.
    ([*ALIGN, "o.pt", "--similarity", "cca"], "--similarity: is an option of --matcher activations or mixture"),
    ([*ALIGN, "o.pt", "--site", "pre"], "--site: is an option of --matcher activations or mixture"),
    ([*ALIGN, "o.pt", "--reduce", "sum"], "--reduce: is an option of --matcher activations or mixture"),
    ([*ALIGN, "o.pt", "--epochs", "2"], "--epochs: is an option of --matcher straight-through"),
    ([*ALIGN, "o.pt", "--learning-rate", "0.1"], "--learning-rate: is an option of --matcher straight-through"),
    ([*ALIGN, "o.pt", "--activation-weight", "0.1"], "--activation-weight: is an option of --matcher mixture"),
    ([*ALIGN, "o.pt", *DATA, "--matcher", "fisher", "--similarity", "cca"], "--similarity: is an option of"),
    ([*ALIGN, "o.pt", *DATA, "--matcher", "mixture", "--epochs", "2"], "--epochs: is an option of"),
    *(
        ([*ALIGN, "o.pt", *DATA, "--matcher", "activations", flag, value], f"{flag}: is an option of --matcher weights or fisher")
        for flag, value in (
            ("--init", "identity"), ("--max-sweeps", "3"), ("--tolerance", "0"), ("--include", "weights"), ("--seed", "1"),
        )
    ),
    # Values out of range, and what is not there.
    ([*ALIGN, "o.pt", "--max-sweeps", "-5"], "--max-sweeps: expected a whole number of at least 1"),
    ([*ALIGN, "o.pt", "--tolerance", "nan"], "--tolerance: expected a finite number"),
    ([*ALIGN, "o.pt", "--init", "nonsense"], "--init: expected greedy, identity or a .safetensors FILE of --permutations; got 'nonsense'"),
    ([*ALIGN, "o.pt", "--init", "none.safetensors"], "none.safetensors: no such file"),
    ([*ALIGN, "o.pt", "--init", "a.safetensors"], "holds no permutations"),
    ([*ALIGN, "o.pt", *DATA, "--matcher", "mixture", "--activation-weight", "1"], "--activation-weight: expected"),
    ([*ALIGN, "o.pt", "--groups", "nothing"], "--groups: 'nothing' is not in the spec"),
    ([*ALIGN, "o.pt", "--groups", "2", "0.hiden"],
     "--groups: '0.hiden' is not in the spec and fits no group of 0 (0.hidden), 2 (2.hidden); did you mean '0.hidden'?"),
    # Out of core, and what is only out of core.
    ([*ALIGN, "o.pt", "--dtype", "bfloat16"], "--dtype: is an option of --out-of-core"),
    ([*ALIGN, "o.pt", "--device", "cpu"], "--device: is an option of --out-of-core"),
    ([*ALIGN, "o.pt", "--out-of-core", "--device", "gpu"], "--device: cannot be used here, got 'gpu'"),
    ([*ALIGN, "o.pt", "--out-of-core", "--device", "cuda:99"], "--device: cannot be used here, got 'cuda:99'"),
    ([*ALIGN, "o.pt", "--resume"], "--resume: is an option of --out-of-core"),
    ([*ALIGN, "o.pt", "--out-of-core", *DATA], "--data: is an option of --matcher activations"),
    ([*ALIGN, "o.pt", "--out-of-core", *DATA, "--matcher", "activations"], "--matcher: alignment out of core matches by weights"),
    ([*ALIGN, "o.pt", "--out-of-core", "--balance"], "--balance: has to run the networks"),
    ([*ALIGN, "o.pt", "--out-of-core", "--no-verify"], "--no-verify: alignment out of core does not verify"),
    ([*ALIGN, "o.pt", "--out-of-core", "--similarity", "cca"], "--similarity: is an option of"),
    ([*ALIGN, "o.pt", "--out-of-core", "--dtype", "int64"], "--dtype: expected a floating point type"),
    ([*ALIGN, "o.pt", "--out-of-core", "--merge", "inf"], "--merge: expected a finite number"),
    (["align", "a.safetensors", "b.safetensors", "--out", "o.pt"], "--model: needed"),
    (["align", ".", ".", "--out", "o", "--input-shape", "2,6"], "--input-shape: needs --model"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused_by_name(planted, refused, arguments, message):
    refused(arguments, message)


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ([], lambda data: fm.MergeMany()),
        (["--strategy", "merge-many", "--max-rounds", "1"], lambda data: fm.MergeMany(max_rounds=1)),
        (["--strategy", "frank-wolfe", "--max-steps", "3"], lambda data: fm.FrankWolfe(max_steps=3)),
        (
            ["--strategy", "merge-many", "--include", "weights", "--seed", "3"],
            lambda data: fm.MergeMany(fm.WeightMatching("identity", include="weights", seed=3)),
        ),
        (["--strategy", "to-reference"], lambda data: fm.ToReference()),
        (
            ["--strategy", "chain", "--matcher", "activations", *DATA],
            lambda data: fm.Chain(fm.ActivationMatching(data)),
        ),
    ],
)
def test_align_many(models, loader, options, strategy, capsys):
    assert main([*MANY, *options, *OUTS]) == 0
    assert capsys.readouterr().out.count("wrote") == 2
    found = fm.align_many(models, torch.zeros(2, 6), strategy(loader))
    for alignment, model, path in zip(found[1:], models[1:], OUTS[1:], strict=True):
        expected = alignment.apply(model).state_dict()
        assert all(torch.equal(expected[k], v) for k, v in load_state(path).items())


@pytest.mark.parametrize(("arguments", "message"), [
    ([*MANY, "--out", "b2.pt"], "--out: expected 2 files"),
    ([*MANY, "--out", "x.pt", "x.pt"], "a file of its own"),
    ([*MANY, "--out", "x.pt", "x.npz"], "--out: expected a file ending in"),
    ([*MANY, *OUTS, *DATA], "--data: is an option of --matcher activations"),
    ([*MANY, *OUTS, *DATA, "--matcher", "activations"], "--matcher: --strategy merge-many matches by weights"),
    ([*MANY, *OUTS, *DATA, "--strategy", "frank-wolfe", "--matcher", "fisher"], "--matcher: --strategy frank-wolfe matches by weights"),
    ([*MANY, *OUTS, "--strategy", "chain", "--max-rounds", "3"], "--max-rounds: is an option of --strategy merge-many or frank-wolfe"),
    ([*MANY, *OUTS, "--max-steps", "3"], "--max-steps: is an option of --strategy frank-wolfe"),
    ([*MANY, *OUTS, "--max-rounds", "0"], "--max-rounds: expected a whole number of at least 1"),
    ([*MANY, *OUTS, "--init", "greedy"], "each match begins at the current permutations; write --init identity, got --init greedy"),
    ([*MANY, *OUTS, "--strategy", "chain", "--site", "pre"], "--site: is an option of --matcher activations or mixture"),
    (["align-many", "a.safetensors", "--model", "cli_module:build", "--out", "o.pt"], "--out: expected 0 files"),
])  # fmt: skip
def test_what_does_not_fit_together_for_many_is_refused_by_name(models, refused, arguments, message):
    refused(arguments, message)
