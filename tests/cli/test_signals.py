"""Signals at every moment of a command, also while it loads libraries: one line, the status of the signal, nothing left behind."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from fastmatch._internal.outputs import writing
from fastmatch.checkpoint.journal import journal_path
from fastmatch.cli.align import kept_by
from fastmatch.cli.main import parser
from fastmatch.cli.signals import Ended, ended_by_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

ALIGN = ["align", "a.safetensors", "b.safetensors", "--model", "cli_module:build_with_inputs", "--out", "o.safetensors"]  # fmt: skip

AT_IMPORT = """
import os, sys
from importlib.abc import MetaPathFinder

class Signalled(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Signalled())
from fastmatch.cli.start import start
sys.exit(start())
"""
"""The command, to which a signal comes when it begins to load a module."""


def _unignore_signals():
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def started(*words):
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_unignore_signals,
    )  # fmt: skip


def how(number):
    return "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("fastmatch.cli.main", signal.SIGINT),
        ("fastmatch.cli.options", signal.SIGTERM),
        ("numpy", signal.SIGINT),
        *(
            pytest.param(name, number, marks=pytest.mark.slow)
            for name in ("numpy._core._multiarray_umath", "numpy.exceptions", "torch._C", "torch.autograd", "torch._refs", "cli_module")
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)  # fmt: skip
def test_a_signal_while_a_library_is_loaded_ends_the_command_in_one_line(planted, name, number):
    before = files(planted)
    process = started("-c", AT_IMPORT.format(name=name, number=int(number)), *ALIGN)
    out, error = process.communicate(timeout=60)
    is_known = not name.startswith("fastmatch.")
    line = f"fastmatch align: {how(number)}; nothing is half-written" if is_known else f"fastmatch: {how(number)} before it began"  # fmt: skip
    assert (process.returncode, out, error) == (128 + number, "", line + "\n")
    assert files(planted) == before, "the lock of the output is removed"


@pytest.fixture(scope="module")
def load_time():
    """Seconds that this machine takes to load what a command needs."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import fastmatch.cli.work.align"], check=True)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.1])
def test_a_signal_at_any_moment_ends_the_command_in_one_line(planted, load_time, share, number):
    before = files(planted)
    process = started("-m", "fastmatch", *ALIGN)
    time.sleep(max(0.1, share * load_time))  # Python itself starts before
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    if process.returncode == 128 + number:
        assert error.count("\n") == 1
        assert error.startswith("fastmatch")
        assert how(number) in error
        assert files(planted) == before
    else:  # it was done, and Python was about to end
        assert process.returncode == 0
        assert out
        assert not error
        assert files(planted) == sorted([*before, "o.safetensors"])


def _send(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


SWALLOWS = """
import os, time
try:
    os.kill(os.getpid(), {number})
    time.sleep(0.1)
except BaseException:
    pass
is_whole = True
"""


def _load_while_writing(path):
    with writing(path):
        assert importlib.import_module("swallows").is_whole
        time.sleep(5)
        raise AssertionError("the command went on")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_in_the_middle_of_work_ends_before_the_signal_is_acted_on(tmp_path, monkeypatch, number):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "swallows.py").write_text(SWALLOWS.format(number=int(number)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt) as caught, ended_by_signals():
            _load_while_writing(tmp_path / "o.safetensors")
        assert sys.modules["swallows"].is_whole
        assert time.monotonic() - start < 4, "the wait after the import is cut off"
        assert isinstance(caught.value, Ended) == (number == signal.SIGTERM)
        assert files(tmp_path) == ["swallows.py"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        sys.modules.pop("swallows", None)


def test_a_signal_whose_exception_was_swallowed_ends_the_command_all_the_same():
    def swallowing():
        try:
            _send(signal.SIGTERM)
        except BaseException:
            return

    with pytest.raises(Ended), ended_by_signals():
        swallowing()


def test_an_error_that_a_signal_has_caused_is_not_told():
    def changed():
        try:
            _send(signal.SIGTERM)
        except BaseException:
            raise AttributeError("module 'numpy' has no attribute 'flexible'") from None

    with pytest.raises(Ended) as caught, ended_by_signals(), ended_by_signals():
        changed()
    assert isinstance(caught.value.__cause__, AttributeError)


TWICE = """
import signal, sys
sys.path.insert(0, ".")
from fastmatch._internal.outputs import writing
from fastmatch.cli.signals import ended_by_signals
from fastmatch._internal.unfinished import is_unfinished
def line(is_asked_twice):
    return "fastmatch: {}" if is_asked_twice or not is_unfinished() else None
with ended_by_signals(line, is_own=True), writing("o.pt"):
    import slow
"""


def test_ctrl_c_twice_ends_an_import_in_the_middle_of_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = started("-c", TWICE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, error) == (128 + signal.SIGINT, "fastmatch: interrupted\n")


AT_EXIT = """
import atexit, os, sys, time
from fastmatch.cli.start import start
def signalled():
    os.kill(os.getpid(), {number})
    time.sleep(5)
    print("went on")
status = start()
atexit.register(signalled)
sys.exit(status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("words", "status"), [(["--version"], 0), (["merge", "none.pt", "--out", "o.pt"], 2)]
)
def test_a_signal_when_the_command_is_done_changes_no_status(tmp_path, monkeypatch, number, words, status):
    monkeypatch.chdir(tmp_path)
    process = started("-c", AT_EXIT.format(number=int(number)), *words)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert out.count("\n") + error.count("\n") == 1, "all of its output, and nothing else"


FORKED = """
import os, sys
from fastmatch.cli.signals import ended_by_signals
with ended_by_signals(lambda _: "said by the parent alone", is_own=True):
    child = os.fork()
    if child == 0:
        try:
            import interrupted
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(8)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_is_not_ended_as_the_command_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    (tmp_path / "interrupted.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    )
    out, error = started("-c", FORKED).communicate(timeout=20)
    assert (out, error) == ("7\n", "")


SCRIPT = """
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.mark.slow
def test_a_script_has_the_handlers_that_python_gives_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = started("-m", "fastmatch", "run", str(tmp_path / "script.py"))
    assert process.communicate(timeout=60) == ("True True\n", "")


def test_where_solutions_are_kept_is_known_without_torch(tmp_path):
    args = parser("align").parse_args(["align", "a", "b", "--out", str(tmp_path / "o")])
    assert kept_by(args) == journal_path(tmp_path / "o")
    program = (
        "import sys\nfrom fastmatch.cli.main import _left_by, parser\n"
        "_left_by(parser('align').parse_args(['align', 'a', 'b', '--out', 'o']))\n"
        "assert not {'numpy', 'torch'} & sys.modules.keys()\n"
    )
    process = started("-c", program)
    assert process.communicate(timeout=60) == ("", "")
