"""What is distributed: the wheel's modules, the sdist's files, and what an installation needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastmatch

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from this folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_both_packages(wheel):
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


@pytest.mark.slow
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
    assert "1.3.27" in lapjv.specifier
    assert "1.3.29" not in lapjv.specifier  # which has no wheel for any version of Python
    for version in ("3.12", "3.13", "3.14"):
        assert not lapjv.marker.evaluate({"python_version": version})
    assert [Requirement(r).name for r in project["optional-dependencies"]["lapjv"]] == ["lapjv"]


@pytest.mark.slow
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


@pytest.mark.slow
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


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_version_is_in_one_place(wheel):
    """The wheel has it from there, and the changelog begins with it."""
    version = fastmatch.__version__
    assert metadata_of(wheel)["Version"] == version
    assert (
        re.search(
            r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
        )[1]
        == version
    )
    for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml"):
        assert not re.search(
            rf"^version\s*[:=].*{re.escape(version)}", (ROOT / name).read_text(), re.MULTILINE
        )


def test_what_the_registry_shows_has_no_link_that_only_works_in_the_repository(wheel):
    text = metadata_of(wheel).get_payload()
    assert "Rethink Model Re-Basin" in text
    assert re.findall(r"\]\((?!https?://|#)[^)]*\)", text) == []
    assert "<picture>" not in text
    assert "src=" not in text
    assert "In your own project: `pip install fastmatch`" in text


def test_a_published_page_links_to_the_files_of_its_version():
    found = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = module_from_spec(found)
    found.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    text = module.described(readme, "https://example.org/x/{}/v1/")
    assert 'src="https://example.org/x/raw/v1/docs/pictures/demo.png"' in text
    assert 'srcset="https://example.org/x/raw/v1/docs/pictures/demo_dark.png"' in text
    assert "](https://example.org/x/blob/v1/docs/start/install.md)" in text
    assert "](https://arxiv.org/abs/2402.05966)" in text
    assert text.count("](") == readme.count("](")
    assert module.described("see ![it](a.png) [b](c.md#d) [e](#f)", "") == "see  b [e](#f)"


WORKFLOWS = ROOT / ".github/workflows"


@pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="the sdist has no workflows")
def test_publishing_comes_after_the_checks_on_every_python():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((WORKFLOWS / "publish.yml").read_text())["jobs"]
    assert (jobs["test"]["needs"], jobs["publish"]["needs"]) == ("build", "test")
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    said = {name: "\n".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    for words in (
        "python -m build",
        "twine check --strict",
        '"v$version" = "$GITHUB_REF_NAME"',
        "CHANGELOG.md",
    ):
        assert words in said["build"]
    for words in ("make test", "fastmatch demo", "dist/*.whl"):
        assert words in said["test"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [c.rpartition(" ")[2] for c in project["classifiers"] if " :: 3." in c]
    for file in ("publish.yml", "ci.yml"):
        (matrix,) = (
            job["strategy"]["matrix"]["python"]
            for job in yaml.safe_load((WORKFLOWS / file).read_text())["jobs"].values()
            if "strategy" in job
        )
        assert matrix == pythons
