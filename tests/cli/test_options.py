"""Every option of every command is used or refused by its name: one generated case for each option in each way to run."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import parser
from fastmatch.cli.matchers import matcher_from
from fastmatch.cli.options import MATCHER_OPTIONS, PARTS
from fastmatch.cli.typed import as_typed

MODEL = ["--model", "cli_module:build_with_inputs"]
DATA = ["--data", "cli_module:loader"]
PAIR = ["a.safetensors", "b.safetensors"]
TRIPLE = [*PAIR, "c.pt"]
FILES = [*TRIPLE, "merged.pt", "normed.pt", "found.safetensors", "recipe.json"]

WAYS: dict[str, list[str]] = {
    "align by weights": ["align", *PAIR, *MODEL, "--out", "out.pt"],
    "align by activations": ["align", *PAIR, *MODEL, *DATA, "--matcher", "activations", "--out", "out.pt"],
    "align by Fisher": ["align", *PAIR, *MODEL, *DATA, "--matcher", "fisher", "--out", "out.pt"],
    "align straight through": [
        "align", *PAIR, *MODEL, *DATA, "--matcher", "straight-through", "--epochs", "1", "--out", "out.pt",
    ],
    "align by a mixture": ["align", *PAIR, *MODEL, *DATA, "--matcher", "mixture", "--out", "out.pt"],
    "align out of core": ["align", *PAIR, *MODEL, "--out-of-core", "--out", "out.pt"],
    **{
        f"align-many, {strategy}": ["align-many", *TRIPLE, *MODEL, "--strategy", strategy, "--out", "out.pt", "out2.pt"]
        for strategy in ("to-reference", "frank-wolfe")
    },
    "plan": ["plan", "folder", "folder"],
    "apply": ["apply", "found.safetensors", "b.safetensors", "--out", "out.pt"],
    "merge": ["merge", *PAIR, *MODEL, "--out", "out.pt"],
    "merge on disk": ["merge", *PAIR, "--out", "out.pt"],
    "partial, identity": ["partial", *PAIR, *MODEL, "--rule", "identity", "--out", "out.pt2"],
    "partial, zip": ["partial", *PAIR, *MODEL, *DATA, "--rule", "zip", "--out", "out.pt2"],
    "renormalize": [
        "renormalize", "merged.pt", "--endpoints", "a.safetensors", *MODEL, *DATA, "--method", "rescale", "--out", "out.pt",
    ],
    "renormalize by reset": [
        "renormalize", "normed.pt", "--model", "cli_module:build_normed", *DATA, "--method", "reset", "--out", "out.pt",
    ],
    "pipeline": ["pipeline", "recipe.json", "--out", "out.pt"],
    "score": ["score", *PAIR, *MODEL, *DATA, "--out", "out.csv"],
    "curve": ["curve", *PAIR, *MODEL, *DATA, "--points", "3", "--out", "out.csv"],
    "curve, renormalized": [
        "curve", *PAIR, *MODEL, *DATA, "--renormalize", "rescale", "--calibration", "cli_module:loader", "--out", "out.csv",
    ],
    "triangle": ["triangle", *TRIPLE, *MODEL, *DATA, "--out", "out.csv"],
    "layers": ["layers", *PAIR, *MODEL, *DATA, "--out", "out.csv"],
    "distances": ["distances", *PAIR, "--out", "out.csv"],
    "inspect": ["inspect", *MODEL],
    "verify": ["verify", *PAIR, *MODEL],
    "libraries": ["libraries"],
}  # fmt: skip
"""Command lines that work. demo, study, bench, run and completion have tests of their own."""

VALUES = {
    "--model": ["cli_module:build_with_inputs"], "--data": ["cli_module:loader"], "--input-shape": ["3,6"],
    "--calibration": ["cli_module:loader"], "--forward": ["cli_module:run"], "--loss": ["cli_module:loss"],
    "--metric": ["cli_module:loss"], "--plot": ["out.png"], "--permutations": ["permutations.safetensors"],
    "--groups": ["0"], "--init": ["identity"], "--dtype": ["bfloat16"], "--device": ["cpu"], "--start-at": ["2"], "--stop-at": ["0"],
    "--apart": ["2"], "--samples": ["9"], "--endpoints": ["a.safetensors"], "--weights": ["0.5", "0.5"], "--merge": ["0.5"],
    "--reference": ["first"], "--block-weights": ["*=0.2"], "--add-difference": ["c.pt"],
    "--report": ["out.html"], "--report-data": ["cli_module:loader"], "--tolerance": ["0.1"], "--learning-rate": ["0.03"], "--activation-weight": ["0.4"],
}  # fmt: skip
"""A value for each option that is neither a number nor one of several words."""

ALREADY_SAID = {
    "--model",
    "--data",
    "--out",
    "--rule",
    "--strategy",
    "--matcher",
    "--method",
    "--renormalize",
}
"""What a way to run gives already, or what makes another way of it."""

MAIN_ONLY = {"--verbose", "--quiet", "--help"}
"""Used before the command runs, or after it failed; tests/cli/test_main.py has them."""


class Watched(argparse.Namespace):
    """Arguments that note which of them are read."""

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


grammar = functools.cache(parser)
"""The parser, which takes as long to make as many of these tests."""


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in grammar()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def cases():
    for way, line in WAYS.items():
        for action in commands()[line[0]]._actions:
            flag = next((o for o in action.option_strings if o.startswith("--")), None)
            if flag and flag not in ALREADY_SAID | MAIN_ONLY and flag not in line:
                yield pytest.param(line, action, flag, id=f"{way}: {flag}")


def words(action: argparse.Action, flag: str) -> list[str]:
    """The option with a value that is not its default."""
    if action.nargs == 0:
        return [flag]
    if flag in VALUES:
        return [flag, *VALUES[flag]]
    if action.choices:
        return [flag, str(next(c for c in reversed(list(action.choices)) if c != action.default))]
    assert action.type is int, f"add a value of {flag} to VALUES"
    return [flag, "2"]


def write_folder(path: str) -> None:
    """Write a language model as Hugging Face does."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(path)


WRITTEN: dict[str, bytes] = {}
"""The files that command lines name, made once: a file that is on the disk for sure takes longer than most of these tests."""


@pytest.fixture
def ready(folder):
    if not WRITTEN:
        write_files()
        WRITTEN.update((path.name, path.read_bytes()) for path in map(Path, FILES))
    for name, data in WRITTEN.items():
        Path(name).write_bytes(data)
    return folder


def write_files() -> None:
    found = [build_model("cli_module:build")[0].eval() for _ in range(3)]
    for path, model in zip(TRIPLE, found, strict=True):
        save_state(model.state_dict(), path)
    save_state(found[0].state_dict(), "merged.pt")
    save_state(build_model("cli_module:build_normed")[0].state_dict(), "normed.pt")
    spec = fm.PermutationSpec.trace(*build_model(MODEL[1]))
    fm.Alignment(spec.random(), spec).save("found.safetensors")
    Path("recipe.json").write_text(json.dumps({"models": PAIR, "network": MODEL[1]}))
    save_state(found[0].state_dict(), "b.safetensors", force=True)  # the same function, for verify


@pytest.mark.parametrize(("line", "action", "flag"), list(cases()))
def test_an_option_is_read_or_refused_by_name(ready, line, action, flag, capsys):
    if line[0] == "plan":
        write_folder("folder")
    given = [*line, *words(action, flag)]
    args = grammar().parse_args(given, Watched())
    args.arguments = given
    vars(args).pop("_read", None)
    refusal = None
    try:
        with ExitStack() as args.outputs:
            args.run(args)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    if refusal is not None:
        assert flag.strip("-").replace("-", " ") in refusal.replace("-", " "), f"{flag}: {refusal}"
        return
    assert action.dest in vars(args)["_read"], f"{flag} is taken and not read"


def test_every_command_is_run_with_all_its_options():
    apart = {"demo", "study", "bench", "run", "warm-up", "completion"}
    assert commands().keys() - apart == {line[0] for line in WAYS.values()}


@pytest.mark.grid
@pytest.mark.parametrize("word", list(PARTS))
@pytest.mark.parametrize("option", MATCHER_OPTIONS, ids=lambda option: option.flag)
def test_an_option_of_a_matcher_arrives_in_the_matcher_or_is_refused(ready, word, option):
    """Whoever reads all options of matchers, and drops one, is found here."""
    line = [
        "align",
        *PAIR,
        *MODEL,
        "--out",
        "out.pt",
        "--matcher",
        word,
        *(DATA if word != "weights" else []),
    ]
    action = next(a for a in commands()["align"]._actions if option.flag in a.option_strings)
    args = grammar().parse_args([*line, *words(action, option.flag)])
    if word not in option.words:
        with pytest.raises(ValueError, match=f"{option.flag}: is an option of --matcher"):
            matcher_from(args)
        return
    matcher = matcher_from(args)
    kind = getattr(fm, option.owner)
    parts = [matcher, *(value for value in vars(matcher).values() if isinstance(value, kind))]
    owner = next(part for part in parts if isinstance(part, kind))
    value, default = getattr(owner, option.field), getattr(kind, option.field)
    assert value != default
    expected = vars(args)[option.field]
    if option.field == "forward":
        value, expected = value.__wrapped__, sys.modules["cli_module"].run
    assert value == expected


@pytest.mark.parametrize("option", MATCHER_OPTIONS, ids=lambda option: option.flag)
def test_an_option_of_a_matcher_is_known_before_torch_as_the_matcher_knows_it(option):
    """Its default, and the values that are refused, with the same words up to the advice."""
    fields = {"init": "greedy", "max_sweeps": 1, "tolerance": 0.0}
    kind = getattr(fm, option.owner)
    needed = {"data": []} if option.owner in ("ActivationMatching", "StraightThrough") else {}
    if option.owner == "Mixture":
        needed = {
            "weight_matching": fm.WeightMatching(**fields),
            "activation_matching": fm.ActivationMatching([]),
        }
    if option.default is not None:
        assert getattr(kind, option.field) == option.default
    for value in (-1, 0, 0.0, 0.5, 1, 1.0, -0.1, 2, 2.0, float("nan"), float("inf")) if option.check else ():
        if option.settings["type"] is int and type(value) is float:
            continue
        said = []
        for judge in (option.check, lambda name, value: kind(**needed, **{name: value})):
            try:
                judge(option.field, value)
                said.append("")
            except ValueError as error:
                said.append(str(error).partition(" (")[0].partition(";")[0])
        assert said[0] == said[1], value


def test_out_of_core_uses_every_option_of_weight_matching(ready, monkeypatch):
    seen = []

    def align_checkpoints(a, b, out, matcher, **options):
        seen.append(matcher)
        raise ValueError("seen")

    monkeypatch.setattr("fastmatch.checkpoint.align_checkpoints", align_checkpoints)
    line = ["align", *PAIR, *MODEL, "--out-of-core", "--out", "out.pt"]
    options = [
        "--init",
        "identity",
        "--max-sweeps",
        "3",
        "--tolerance",
        "0.5",
        "--include",
        "weights",
        "--seed",
        "4",
    ]
    args = grammar().parse_args([*line, *options])
    with ExitStack() as args.outputs, pytest.raises(ValueError, match="seen"):
        args.run(args)
    assert [vars(matcher) for matcher in seen] == [vars(fm.WeightMatching("identity", 3, 0.5, "weights", 4))]


def test_functions_of_the_user_are_called(ready):
    from fastmatch.cli.main import main

    line = [
        *WAYS["curve"],
        "--forward",
        "cli_module:run",
        "--loss",
        "cli_module:loss",
        "--metric",
        "cli_module:loss",
    ]
    assert main(line) == 0
    rows = [row.split(",") for row in (ready / "out.csv").read_text().splitlines()]
    assert rows[0] == ["position", "loss", "top-1", "top-5", "metric"]
    assert float(rows[1][1]) == pytest.approx(7 * torch.pi, rel=1e-3)
    assert rows[1][4] == rows[1][1]


def test_an_error_about_an_argument_names_the_option():
    """Every option of every command, as the library calls it: first in an error, in advice, and in a sentence."""
    for name, command in commands().items():
        args = argparse.Namespace(grammar=grammar(), command=name, arguments=[name])
        for action in command._actions:
            if not action.option_strings or action.dest == "help":
                continue
            flag = action.option_strings[-1]
            args.__dict__[action.dest] = (
                "typed"  # of several options for one argument, the one that was typed counts
            )
            assert as_typed(f"{action.dest}: expected 2; got 3", args) == f"{flag}: expected 2; got 3"
            assert (
                as_typed(f"use {action.dest}='word'; or {action.dest}=", args)
                == f"use {flag} word; or {flag}"
            )
            if "_" in action.dest:
                assert as_typed(f"choose another {action.dest}", args) == f"choose another {flag}"


@pytest.mark.parametrize(("line", "said", "told"), [
    (WAYS["align by weights"], "x exists; pass force=True (--force) to replace it", "x exists; pass --force to replace it"),
    (WAYS["align by weights"], "model: fails; pass verify=False to go on", "--model: fails; pass --no-verify to go on"),
    (WAYS["align-many, to-reference"], "model: fails; pass verify=False to go on", "--model: fails"),
    (WAYS["align by weights"], "model_b: no tensor 'x'", "b.safetensors: no tensor 'x'"),
    (WAYS["partial, zip"], "models[1]: no tensor 'x'", "b.safetensors: no tensor 'x'"),
    (WAYS["partial, zip"], "endpoints: try method=\"reset\"", "endpoints: try --renormalize reset"),
    (WAYS["merge"], "weights: too small for biases=\"normalize\"", "--weights: too small for --biases normalize"),
    (WAYS["renormalize"], "endpoints: pass weights= to them (weights=[1.0] for one)", "--endpoints: pass --weights to them (--weights 1.0 for one)"),
    (WAYS["align by weights"], "or trace(..., unread='hold'), which", "or --unread hold, which"),
    (WAYS["inspect"], "example_inputs: give several; or trace(..., unread='hold'), which holds", "--model (its example inputs): give several"),
    (["inspect", *MODEL, "--input-shape", "2,6"], "example_inputs: no", "--input-shape: no"),
    (["pipeline", "recipe.json"], "out: expected a file", "out: expected a file"),  # a key of the recipe, for it was not typed
    (["pipeline", "recipe.json", "--out", "x"], "out: expected a file", "--out: expected a file"),
    (["align", "data", "b", "--data", "m:f", "--out", "o"], "data: is damaged", "data: is damaged"),  # a path
    (WAYS["align by weights"], "does not run (Given groups=1, weight", "does not run (Given groups=1, weight"),  # torch's
    (WAYS["align by weights"], "--data: m:f failed with Error: seed=3", "--data: m:f failed with Error: seed=3"),
])  # fmt: skip
def test_what_the_library_says_is_said_as_it_was_typed(line, said, told):
    args = grammar().parse_args(line)
    args.grammar, args.arguments = grammar(), line
    assert as_typed(said, args) == told


def test_a_function_of_the_user_that_fails_is_named_with_what_it_was_given(ready, capsys):
    from fastmatch.cli.main import main

    Path("measures.py").write_text(
        "def fails(*given):\n    return {}['width']\n\ndef rows(outputs, targets):\n    return targets\n"
    )
    error = "KeyError: 'width' (measures.py, line 2)"
    for option, given in (
        ("--loss", "(40, 7) float32, (40,) int64"),
        ("--metric", "(40, 7) float32, (40,) int64"),
        ("--forward", "Sequential, tuple"),
    ):
        assert main([*WAYS["curve"], option, "measures.py:fails"]) == 2
        assert f"{option}: measures.py:fails failed on ({given}) with {error}" in capsys.readouterr().err
    for option in ("--loss", "--metric"):
        assert main([*WAYS["curve"], option, "measures.py:rows"]) == 2
        told = f"{option}: expected one number for a batch, its mean; the function returned (40,) int64"
        assert told in capsys.readouterr().err
