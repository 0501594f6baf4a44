"""The wheel holds both packages, every module of them, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

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
