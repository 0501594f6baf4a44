"""The cache of compiled kernels: in processes of their own, over a copy of the package with two kernels more."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numba
import pytest

import fastmatch_kernels
from fastmatch_kernels._numba import cache

CALLEE = (
    "from fastmatch_kernels._numba.cache import njit\n\n@njit(nogil=True)\ndef inner(x):\n    return x + 1\n"
)
CALLER = """
from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.probe.callee import inner

@njit(nogil=True)
def outer(x):
    return 2 * inner(x)
"""
CLOSURE = """
from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels.probe.callee import inner

def make(factor):
    @njit(nogil=True)
    def outer(x):
        return factor * inner(x)
    return outer

outer = make(2)
"""
RUN = """
import sys
from fastmatch_kernels.probe.caller import outer
print(*[outer(eval(x)) for x in sys.argv[1:]], sum(outer._cache_hits.values()))
"""
"""Prints the values of the arguments and how many of them were loaded from the cache."""


@pytest.fixture
def package(tmp_path):
    """A copy of the package with ``probe.caller``, a kernel that calls one of ``probe.callee``."""
    target = tmp_path / "site" / "fastmatch_kernels"
    source = Path(fastmatch_kernels.__file__).parent
    (target / "_numba").mkdir(parents=True)
    for name in ("__init__.py", "_numba/__init__.py", "_numba/cache.py", "_numba/llvm.py"):
        shutil.copy(source / name, target / name)
    probe = target / "probe"
    probe.mkdir()
    for name, text in (("__init__", ""), ("callee", CALLEE), ("caller", CALLER)):
        (probe / f"{name}.py").write_text(text)
    return target


def _drop_rights():
    """Root's child may no longer write where permissions forbid it (CAP_DAC_OVERRIDE)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def _environment(package, more):
    return {
        "PYTHONPATH": str(package.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/dev/null",  # no folder: nothing can be made in it
        "TMPDIR": str(package.parents[1]),
        **more,
    }


def start(package, *arguments, drop_rights=False, **environment):
    """A new process, which others can run beside and which rights can be taken from."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *(arguments or ["1"])],
        env=_environment(package, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_drop_rights if drop_rights else None,
    )


def ended(process):
    """(what was printed, warnings)."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.split(), errors


@pytest.fixture
def run(package, numba_programs):
    """Run the kernel in a process of its own: (what was printed, warnings)."""

    def run(*arguments, code=RUN, **environment):
        settings = _environment(package, environment)
        done = numba_programs.run(code, *(arguments or ["1"]), environment=settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(), done.stderr

    return run


def block(package):
    """Leaves no way to write into the package, for root neither."""
    (package / "__pycache__").write_text("not a folder")


KEPT = """
from fastmatch_kernels._numba.cache import is_kept
from fastmatch_kernels.probe.caller import outer
print(is_kept(outer))
"""


def test_a_kernel_is_kept_from_when_it_is_compiled_until_a_source_changes(package, run):
    assert run(code=KEPT)[0] == ["False"]
    run()
    assert run(code=KEPT)[0] == ["True"]
    (package / "probe" / "callee.py").write_text(CALLEE.replace("x + 1", "x + 2"))
    assert run(code=KEPT)[0] == ["False"]


def test_a_changed_source_recompiles_what_calls_it_and_its_old_code_is_removed(package, run):
    assert run()[0] == ["4", "0"]
    assert run()[0] == ["4", "1"]
    files = sorted((package / "__pycache__").glob("*.nbc"))
    assert [p.name.split(".cpython")[0] for p in files] == ["probe.callee.inner", "probe.caller.outer"]
    (package / "probe" / "callee.py").write_text(CALLEE.replace("x + 1", "x + 2"))
    assert run()[0] == ["6", "0"]
    assert run()[0] == ["6", "1"]
    changed = sorted((package / "__pycache__").glob("*.nbc"))
    assert len(changed) == 2
    assert not {p.name for p in changed} & {p.name for p in files}


@pytest.mark.parametrize(
    "place",
    [*(pytest.param(p, marks=pytest.mark.slow) for p in ("home", "temporary folder")), "NUMBA_CACHE_DIR"],
)
def test_where_the_package_cannot_be_written_the_second_run_loads_what_the_first_compiled(
    package, run, place, tmp_path
):
    block(package)
    environment = {
        "home": {"HOME": str(tmp_path / "home")},
        "temporary folder": {},
        "NUMBA_CACHE_DIR": {"NUMBA_CACHE_DIR": str(tmp_path / "given")},
    }[place]
    for hits in ("0", "1"):
        assert run(**environment) == (["4", hits], "")
    (found,) = {p.parent for p in tmp_path.rglob("*.nbc")}
    top = found.relative_to(tmp_path).parts[0]
    assert top.startswith(
        {"home": "home", "temporary folder": "fastmatch-", "NUMBA_CACHE_DIR": "given"}[place]
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="root gives up its right to write anywhere by prctl")
def test_a_read_only_package_is_still_loaded_from_and_what_is_new_goes_elsewhere(package, run):
    assert run()[0] == ["4", "0"]
    compiled = package / "__pycache__"
    compiled.chmod(0o555)
    before = sorted(compiled.iterdir())
    for hits in ("1", "2"):
        assert ended(start(package, "1", "1.0", drop_rights=True))[0] == ["4", "4.0", hits]
    assert sorted(compiled.iterdir()) == before


@pytest.mark.slow
def test_without_any_place_every_process_compiles_and_says_what_to_set(run):
    for _ in range(2):
        printed, errors = run(NUMBA_CACHE_DIR="/dev/null/nowhere")
        assert printed == ["4", "0"]
        assert errors.count("set NUMBA_CACHE_DIR to a folder that can be written") == 1


@pytest.mark.grid
@pytest.mark.parametrize("place", ["home", "temporary folder"])
@pytest.mark.parametrize("flaw", ["mode", "link"])
def test_a_folder_that_others_can_write_to_is_neither_loaded_from_nor_saved_to(
    package, run, place, flaw, tmp_path
):
    block(package)
    environment = {"HOME": str(tmp_path / "home")} if place == "home" else {}
    assert run(**environment)[0] == ["4", "0"]
    (folder,) = {p.parent for p in tmp_path.rglob("*.nbc")}
    assert folder.stat().st_mode & 0o777 == 0o700
    if flaw == "mode":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert run(**environment)[0] == ["4", "0"]
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


@pytest.mark.slow
def test_a_temporary_folder_made_by_others_is_not_used(package, run, tmp_path):
    block(package)
    shared = tmp_path / f"fastmatch-{os.geteuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    assert run()[0] == ["4", "0"]
    assert not list(shared.rglob("*"))


@pytest.mark.slow
def test_versions_of_numba_keep_each_their_own_files(package, run):
    run()
    compiled = package / "__pycache__"
    other = [
        p.rename(p.with_name(p.name.replace(f"numba{numba.__version__}", "numba0.1")))
        for p in compiled.glob("*.nbc")
    ]
    (package / "probe" / "callee.py").write_text(CALLEE.replace("x + 1", "x + 2"))
    assert run()[0] == ["6", "0"]
    assert all(p.exists() for p in other)
    assert len(list(compiled.glob("*.nbc"))) == 4


@pytest.mark.slow
def test_a_closure_and_a_function_from_elsewhere_are_not_cached(package, run):
    (package / "probe" / "caller.py").write_text(CLOSURE)
    assert run()[0] == ["4", "0"]
    assert run()[0] == ["4", "0"]
    (package / "probe" / "caller.py").write_text("from elsewhere import outer\n")
    (package.parent / "elsewhere.py").write_text(CALLER)
    for _ in range(2):
        assert run()[0] == ["4", "0"]
    assert not list((package / "__pycache__").glob("*outer*"))


def test_temporary_files_of_processes_that_died_are_removed_after_a_day(package, run):
    compiled = package / "__pycache__"
    compiled.mkdir()
    old, new = compiled / "old.nbc.0123", compiled / "new.nbc.4567"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    run()
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize(("number", "kept"), [(errno.ENOSPC, True), (errno.EROFS, False)])
def test_a_full_disk_is_tried_again_and_a_read_only_one_is_not(tmp_path, monkeypatch, number, kept):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "folders", lambda: (tmp_path,))
    monkeypatch.setattr(cache, "_unwritable", set())
    monkeypatch.setattr(cache, "dumps", lambda _: b"")
    monkeypatch.setattr(cache._FileCache, "_write", fail)
    files = cache._FileCache(fail)
    monkeypatch.setattr(files, "_file", lambda *_: "name")
    monkeypatch.setattr(files, "_enabled", True)
    files.save_overload(None, MagicMock(library=MagicMock(has_dynamic_globals=False), lifted=[]))
    assert (tmp_path not in cache._unwritable) == kept


@pytest.mark.slow
def test_processes_that_compile_at_once_leave_what_all_can_load(package, run):
    given = [["1", "1.0"], ["1.0", "1"], ["1j"], ["1"]]
    running = [start(package, *arguments) for arguments in given]
    values = {"1": "4", "1.0": "4.0", "1j": "(2+2j)"}
    for process, arguments in zip(running, given, strict=True):
        assert ended(process)[0][:-1] == [values[x] for x in arguments]
    assert run("1", "1.0", "1j")[0] == ["4", "4.0", "(2+2j)", "3"]
    assert not [p for p in (package / "__pycache__").iterdir() if p.suffix != ".nbc"]


def test_a_file_that_was_cut_off_is_compiled_again(package, run):
    run()
    for path in (package / "__pycache__").glob("*.nbc"):
        path.write_bytes(path.read_bytes()[:100])
    assert run()[0] == ["4", "0"]
    assert run()[0] == ["4", "1"]


@pytest.mark.slow
def test_kernels_are_compiled_where_numba_is_told_not_to(run):
    assert run(NUMBA_DISABLE_JIT="1")[0] == ["4", "0"]
    assert run()[0] == ["4", "1"]


INNER = """
from fastmatch_kernels._numba.cache import njit
from fastmatch_kernels._numba.llvm import borrowed, flat

@njit(nogil=True, inner=True)
def inner(x):
    return x + 1

@njit(nogil=True)
def outer(x):
    return 2 * inner(x)

@njit(nogil=True)
def total(matrix, rows):
    run, (first, second) = flat(matrix), borrowed(rows)
    s = 0.0
    for j in range(run.shape[0]):
        s += run[j]
    for i in range(first.shape[0]):
        s += first[i, 0] - second[i, 0]
    return s
"""


def test_kernels_for_kernels_are_compiled_cached_and_refused_to_python(package, run):
    (package / "probe" / "caller.py").write_text(INNER)
    assert run()[0] == ["4", "0"]
    assert run()[0] == ["4", "1"]
    code = (
        "from fastmatch_kernels.probe.caller import inner\n"
        "try:\n    inner(1)\nexcept TypeError as error:\n    print(error)"
    )
    assert " ".join(run(code=code)[0]).startswith("inner was compiled for kernels only")


def test_runs_and_borrowed_arrays_hold_the_same_numbers_and_no_reference(package, run):
    (package / "probe" / "caller.py").write_text(INNER)
    code = (
        "import sys, numpy as np; from fastmatch_kernels.probe.caller import total\n"
        "a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 3)); before = sys.getrefcount(a), sys.getrefcount(b)\n"
        "print(total(a, (a, b)), (sys.getrefcount(a), sys.getrefcount(b)) == before)"
    )
    assert run(code=code)[0] == ["16.0", "True"]


def test_the_garbage_collector_runs_again_after_compiling(run):
    code = (
        "import gc; from fastmatch_kernels.probe.caller import outer\n"
        "outer(1); print(gc.isenabled()); gc.disable(); outer(1.0); print(gc.isenabled())"
    )
    assert run(code=code)[0] == ["True", "False"]
