"""What is distributed: the wheel's modules, the sdist's files, and what an installation needs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_both_packages(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    roots = {"fastmatch": ROOT, "fastmatch_kernels": ROOT / "kernels"}
    expected = {
        str(path.relative_to(root))
        for package, root in roots.items()
        for path in (root / package).rglob("*")
        if path.suffix in (".py", ".pyi", ".typed", ".html", ".css")
    }
    assert held == expected
    assert {
        "fastmatch/py.typed",
        "fastmatch/report/templates/page.html",
        "fastmatch_kernels/py.typed",
    } <= held


def test_the_sdist_holds_what_its_tests_read(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files is git's")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).is_file()}
    assert {name for name in tracked - held if not name.startswith(".github/")} == set()


def test_an_installation_needs_no_compiler():
    """lapjv has wheels for Python 3.11 and before only; elsewhere it is an extra, imported where it is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (lapjv,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "lapjv")
    assert lapjv.marker is not None
    assert lapjv.marker.evaluate({"python_version": "3.11"})
    for version in ("3.12", "3.13", "3.14"):
        assert not lapjv.marker.evaluate({"python_version": version})
    assert [Requirement(r).name for r in project["optional-dependencies"]["lapjv"]] == ["lapjv"]


def test_without_lapjv_all_but_its_solver_works():
    code = """
import sys
sys.modules["lapjv"] = None
import numpy as np, fastmatch as fm
assert fm.solve(np.eye(5)).col_ind.size == 5
with fm.backends.installed():
    pass
try:
    fm.solve(np.eye(5), solver=fm.assignment.LapJV())
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "LapJV needs the package lapjv: pip install 'fastmatch[lapjv]'\n"


def test_the_package_is_found_from_the_folder_that_holds_the_clone(tmp_path):
    """There, the clone's own folder is a namespace package of the same name; an installed one comes before it."""
    (tmp_path / "fastmatch").symlink_to(ROOT, target_is_directory=True)
    site = tmp_path / "site"
    site.mkdir()
    (site / "fastmatch.pth").write_text(f"{ROOT}\n{ROOT / 'kernels'}\n")
    code = f"import site; site.addsitedir({str(site)!r}); import fastmatch; print(fastmatch.backends.installed().targets[0].library)"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout == "scipy\n", done.stderr
