"""The grammar of the command line, and what starting it loads."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastmatch
from fastmatch._internal.files import load_state, save_state
from fastmatch.cli.commands import SUMMARIES
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import _left_by, main, parser
from fastmatch.cli.signals import Ended, ended_by_signals

PAIR = ["a.safetensors", "b.safetensors"]
DATA = ["--data", "cli_module:loader"]

COMMANDS = {
    "align", "align-many", "apply", "merge", "partial", "plan", "renormalize", "pipeline", "score", "curve", "triangle", "layers",
    "distances", "inspect", "verify", "demo", "study", "bench", "run", "libraries", "warm-up", "completion",
}  # fmt: skip


def subcommands(root: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in root._actions if isinstance(a, argparse._SubParsersAction))
    assert {a.dest for a in action._choices_actions if a.help} == set(action.choices)  # each in the summary
    return dict(action.choices)


def test_every_option_of_every_command_has_help_text():
    commands = subcommands(parser())
    assert commands.keys() == COMMANDS
    for name, command in commands.items():
        assert command.description, name
        assert callable(command.get_default("run")), name
        for action in command._actions:
            assert action.help, f"{name} {action.option_strings or action.dest}"
            assert action.help != argparse.SUPPRESS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_shows_every_default(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for action in subcommands(parser())[command]._actions:
        is_unset = action.default is None or isinstance(action.default, bool) or action.default == []
        if action.option_strings and not is_unset and action.default != argparse.SUPPRESS:
            assert f"(default: {action.default})" in shown, action.dest


def test_a_shared_option_is_the_same_everywhere():
    settings: dict[str, set[object]] = {}
    for command in subcommands(parser()).values():
        for action in command._actions:
            for flag in action.option_strings:
                settings.setdefault(flag, set()).add((action.type, type(action), str(action.choices)))
    # After a partial merge "auto" is not among the methods, and a model may be given for each checkpoint. A plan names a kind of
    # device, which need not be there.
    assert {flag for flag, found in settings.items() if len(found) > 1} == {
        "--renormalize",
        "--device",
        "--model",
    }


def test_the_installed_command_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastmatch", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "inspect" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["algin"]])
def test_what_is_about_all_commands_loads_no_torch(arguments):
    code = (
        f"import sys\nfrom fastmatch.cli.main import main\ntry:\n    main({arguments})\n"
        "except SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_help_lists_the_commands_that_there_are():
    """Summaries are listed without their modules, which must add the same commands."""
    assert list(subcommands(parser())) == list(SUMMARIES) == list(subcommands(parser("")))


@pytest.mark.parametrize("code", ["import fastmatch", "from fastmatch import *", "import fastmatch.cli.main"])
def test_importing_loads_neither_triton_nor_numba(programs, code):
    heavy = ("triton", "numba", "lapjv", "matplotlib", "scipy", "sklearn", "transformers", "pandas")
    code = f"import sys; {code}; print([m for m in {heavy} if m in sys.modules])"
    done = programs.run(code, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastmatch {fastmatch.__version__}\n"


def test_every_command_shows_examples_that_can_be_parsed():
    for name, command in subcommands(parser()).items():
        lines = (command.epilog or "").splitlines()[1:]
        assert lines, name
        for line in lines:
            program, used, *rest = shlex.split(line)
            assert (program, used) == ("fastmatch", name)
            own = {"run": 0, "completion": 1}.get(used)  # what follows belongs to the script, or to the shell
            parser().parse_args([used, *rest[:own]])


INSPECT = ["inspect", "--model", "cli_module:build_with_inputs"]


@pytest.mark.parametrize(("line", "keys"), [
    (["align", *PAIR, "--out", "o.pt"], {"moved", "objective", "converged", "out"}),
    (["align-many", *PAIR, "--out", "o.pt"], {"alignments"}),
    (["merge", *PAIR, "--out", "o.pt"], {"checkpoints", "biases", "out"}),
    (["partial", *PAIR, "--rule", "identity", "--out", "o.pt2"], {"merged", "parameters", "out"}),
    (["renormalize", PAIR[0], "--endpoints", PAIR[1], *DATA, "--out", "o.pt"], {"method", "layers", "out"}),
    (["curve", *PAIR, *DATA, "--points", "3", "--out", "o.csv"], {"rows", "loss_barrier", "out"}),
    (["triangle", *PAIR, PAIR[0], *DATA, "--points", "3", "--out", "o.csv"], {"rows", "loss_barrier", "out"}),
    (["layers", *PAIR, *DATA, "--out", "o.csv"], {"rows", "out"}),
    (["verify", *PAIR], {"same", "outputs", "error"}),
    (["inspect"], {"groups", "pins"}),
    (["libraries"], {"libraries"}),
    (["apply", "permutations.safetensors", PAIR[1], "--out", "o.pt"], {"kind", "moved", "out"}),
    (["pipeline", "recipe.json", "--out", "o.pt"], {"summary", "files"}),
    (["align", *PAIR, "--out", "o.pt", "--report", "o.html"], {"moved", "out", "report"}),
    (["merge", *PAIR, "--out", "o.pt", "--report", "o.html"], {"checkpoints", "out", "report"}),
    (["renormalize", PAIR[0], "--endpoints", PAIR[1], *DATA, "--out", "o.pt", "--report", "o.html"], {"why", "report"}),
])  # fmt: skip
def test_json_is_one_object_and_quiet_is_silent(planted, capsys, line, keys):
    model = ["--model", "cli_module:build_with_inputs"]
    assert (
        main(["align", *PAIR, *model, "--out", "m.pt", "--permutations", "permutations.safetensors", "-q"])
        == 0
    )
    Path("recipe.json").write_text(json.dumps({"models": PAIR, "network": model[1]}))
    model = [] if line[0] in ("libraries", "apply", "pipeline") else model
    line = [*line, *model]
    assert main([*line, "--json"]) == 0
    every: list[str] = []
    said = json.loads(
        capsys.readouterr().out,
        object_pairs_hook=lambda pairs: every.extend(k for k, _ in pairs) or dict(pairs),
    )
    assert keys <= said.keys()
    assert not [key for key in every if " " in key]
    assert main([*line, "--quiet", *(["--force"] if "--out" in line else [])]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_quiet_hides_bars_on_a_terminal(monkeypatch):
    from fastmatch._internal import progress

    shown = []
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        progress, "tqdm", lambda items, **options: shown.append(not options["disable"]) or items
    )
    for quiet in (False, True):
        with progress.no_progress(quiet):
            list(progress.progress_bar([1], "title"))
            list(progress.progress_bar([1], "title", show=True))
    assert shown == [True, True, False, True]


@pytest.mark.parametrize(("items", "total"), [([1, 2, 3, 4], None), (iter([1, 2, 3, 4]), 4)])
def test_a_bar_shows_how_much_is_done_and_the_time_that_remains(monkeypatch, capsys, items, total):
    from fastmatch._internal import progress

    at_once = {"delay": 0, "mininterval": 0}  # not after the second in which most calls end
    monkeypatch.setattr(
        progress, "tqdm", lambda items, real=progress.tqdm, **options: real(items, **{**options, **at_once})
    )
    shown = progress.progress_bar(items, "reading", show=True, total=total)
    assert [next(shown), next(shown), next(shown)] == [1, 2, 3]
    assert re.search(r"reading: +50%.* 2/4 \[\d\d:\d\d<\d\d:\d\d,", capsys.readouterr().err)


@pytest.mark.parametrize(("line", "message"), [
    (["algin"], "did you mean 'align'?"),
    ([*INSPECT, "--input-shap", "2,6", "--jsn"], "did you mean '--json'?"),
    (["verify", "a"], "the following arguments are required: b"),
    (["renormalize", "a", "--model", "m:f", "--data", "m:f", "--out", "o.pt", "--method", "repiar"], "did you mean 'repair'?"),
])  # fmt: skip
def test_words_that_are_not_known_are_one_line_with_the_nearest(line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"--model": "./net.py:build"}, "--model: no file ./net.py"),
    ({"--model": "./cli_module.py:biuld"}, "has no callable 'biuld'; did you mean 'build'?"),
    ({"--model": "cli_module:torch"}, "'torch' of 'cli_module' is module, expected a callable"),
    ({"--model": "broken_module:build"}, "--model: importing broken_module failed with SyntaxError"),
    ({"--model": "needy_module:build"}, "needy_module imports 'not_there', which is not installed"),
    ({"--model": "cli_module:fails"}, "--model: cli_module:fails failed with KeyError: 'width' (cli_module.py, line"),
    ({"--input-shape": "0,6"}, "--input-shape: expected numbers of at least 1"),
    ({"a": "empty.safetensors"}, "empty.safetensors: not a readable safetensors file"),
    ({"a": "empty.pt"}, "empty.pt: not a torch file"),
    ({"a": "cli_module.py"}, "cli_module.py: not a torch file"),
    ({"a": "nowhere.pt"}, "nowhere.pt: no such file"),
    ({"a": "renamed.pt"}, "renamed.pt: has no tensor '0.weight', which --model has (also '2.weight', '4.weight'; 3 in all)"),
    ({"a": "renamed.pt"}, "the nearest that it has is '0.weigth'"),
    ({"a": "wrapped.pt"}, "has the names of the other with the prefix '_orig_mod.' (besides 'ema'), as torch.compile adds it"),
    ({"--seed": "-1"}, "--seed: expected a whole number of at least 0; got -1"),
])  # fmt: skip
def test_wrong_input_is_one_line_that_says_what_to_do(planted, refused, change, message):
    with Path("cli_module.py").open("a") as file:
        file.write("\ndef fails():\n    return {}['width']\n")
    Path("broken_module.py").write_text("def build(:\n")
    Path("needy_module.py").write_text("import not_there\n\nbuild = not_there.build\n")
    for name in ("empty.safetensors", "empty.pt"):
        Path(name).write_bytes(b"")
    state = load_state("a.safetensors")
    save_state({name.replace("weight", "weigth"): t for name, t in state.items()}, "renamed.pt")
    save_state(
        {**{f"_orig_mod.{name}": t for name, t in state.items()}, "ema": state["0.bias"]}, "wrapped.pt"
    )
    given = {"a": "a.safetensors", "--model": "./cli_module.py:build_with_inputs", "--out": "o.pt", **change}
    sys.modules.pop("cli_module", None)
    refused(
        ["align", given.pop("a"), "b.safetensors", *(word for pair in given.items() for word in pair)],
        message,
    )


@pytest.mark.parametrize(("line", "said"), [
    ("aling a.pt", "fastmatch: unknown command 'aling'; did you mean 'align'? (see `fastmatch --help`)"),
    ("plan a b --model x:y", "fastmatch plan: unknown: --model x:y (see `fastmatch plan --help`)"),
    ("align a b --outt o.pt", "fastmatch align: the following arguments are required: --out; unknown: --outt; did you mean '--out'? (see `fastmatch align --help`)"),
    ("curve a b --modl=x:y --dat x:y --points two --out o.csv",
     "fastmatch curve: argument --points: invalid int value: 'two'; unknown: --modl=x:y; did you mean '--model'? (see `fastmatch curve --help`)"),
    ("align a b --modle x:y --out o.pt", "fastmatch align: unknown: --modle x:y; did you mean '--model'? (see `fastmatch align --help`)"),
])  # fmt: skip
def test_an_unknown_word_is_told_with_the_nearest_if_one_is_near(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == said + "\n"


def test_other_errors_are_one_line_too_and_verbose_shows_where(planted, monkeypatch, capsys):
    def broken(args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("fastmatch.cli.loading.build_network", broken)
    assert main(INSPECT) == 1
    assert capsys.readouterr().err == "fastmatch inspect: RuntimeError: two lines (--verbose shows where)\n"
    assert main([*INSPECT, "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_file_beside_a_module_of_the_same_name_is_the_one_that_runs(planted):
    other = planted / "other"
    other.mkdir()
    (other / "cli_module.py").write_text("import beside\nbuild = beside.build\n")
    (other / "beside.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 3)\n")
    assert build_model("cli_module:build")[0].__class__.__name__ == "Sequential"
    assert build_model("other/cli_module.py:build")[0].__class__.__name__ == "Linear"
    sys.modules.pop("beside", None)


WAITING = """
import sys, time
from cli_module import *

def slow():
    print("ready", flush=True)
    time.sleep(60)
"""


def _unignore_signals():
    """Give a command the signals of a foreground job: a job in the background inherits an ignored SIGINT."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def signalled(process, number):
    """Send a signal to a command once it is ready; return the words for it and what the command then says."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    return "interrupted" if number == signal.SIGINT else f"ended by {number.name}", error


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGINT))],
)
def test_a_signal_ends_a_command_as_ctrl_c_does(planted, number):
    (planted / "waiting.py").write_text(WAITING)
    (planted / ".o.pt.journal").write_text("")
    line = ["align", *PAIR, "--model", "waiting.py:slow", "--out", "o.pt"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmatch", *line],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_unignore_signals,
    )  # fmt: skip
    how, error = signalled(process, number)
    assert error.startswith(f"fastmatch align: {how}; nothing is half-written")
    assert "the same command with --resume" in error
    assert error.count("\n") == 1
    assert not list(planted.glob("*.part"))
    assert not (planted / "o.pt").exists()


def _end_this_process(*numbers):
    for number in numbers or (signal.SIGTERM,):
        os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_signals_that_are_ignored_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(Ended) as caught, ended_by_signals():
            _end_this_process(signal.SIGHUP, signal.SIGTERM)
        assert caught.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_second_signal_does_not_stop_the_removal_of_files():
    """A stopping system sends SIGTERM and SIGHUP one after the other."""
    removed = []

    def interrupted_twice():
        try:
            _end_this_process()
        finally:
            for number in (signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
            removed.append("part")

    with pytest.raises(Ended) as caught, ended_by_signals():
        interrupted_twice()
    assert caught.value.number == signal.SIGTERM
    assert removed == ["part"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_torch_is_loaded_is_one_line_too(tmp_path, number):
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    for name in "ab":
        (tmp_path / name).write_text("")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", "from fastmatch.cli.start import start; raise SystemExit(start())", "distances", "a", "b"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=_unignore_signals, cwd=tmp_path,
    )  # fmt: skip
    how, error = signalled(process, number)
    assert error == f"fastmatch distances: {how}; nothing is half-written\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_terminal_that_closes_ends_the_command_with_its_status(planted):
    """Then the line about it has no place to go."""
    (planted / "waiting.py").write_text(WAITING)
    shell, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmatch", "align", *PAIR, "--model", "waiting.py:slow", "--out", "o.pt"],
        stdout=subprocess.PIPE, stderr=terminal, text=True, preexec_fn=_unignore_signals,
    )  # fmt: skip
    os.close(terminal)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.close(shell)
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGHUP


def test_an_interrupted_series_says_what_goes_on(tmp_path):
    args = parser().parse_args(["align-many", "a", "b", "--out", str(tmp_path / "out")])
    assert _left_by(args) == ""
    (tmp_path / ".out.many").mkdir()
    assert _left_by(args).endswith("the same command with --resume goes on")


def test_a_reader_that_goes_away_is_no_error(planted):
    command = [sys.executable, "-m", "fastmatch", *INSPECT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "align-many" in script
    assert "--max-sweeps" in script or "max-sweeps" in script


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'fastmatch[shell]'" in capsys.readouterr().err
