import os
import subprocess
import sys

import pytest
import torch

from fastmatch_kernels.ops import backend_of


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_loads_neither_triton_nor_numba():
    done = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastmatch_kernels.ops\nfrom fastmatch import *\n"
        "found = {'triton', 'numba'} & (set(sys.modules) - before)\n"
        "assert not found, found\n"
    )
    assert done.returncode == 0, done.stderr


def test_triton_asked_for_on_cpu_tensors_is_an_error_not_another_backend():
    done = run(
        "import torch; from fastmatch_kernels.ops import gain\n"
        "gain([(torch.ones(2, 2), torch.ones(2, 2))], backend='triton')\n"
    )
    assert done.returncode != 0
    assert "backend: Triton kernels need CUDA or HIP tensors" in done.stderr


def test_the_device_chooses():
    x = torch.ones(2)
    assert backend_of(x) == "cpu"
    assert backend_of(x, backend="reference") == "reference"
    meta = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got meta"):
        backend_of(meta)
    assert backend_of(meta, backend="reference") == "reference"
    with pytest.raises(ValueError, match="backend: 'cpu' needs CPU tensors"):
        backend_of(meta, backend="cpu")
    with pytest.raises(ValueError, match="tensors: expected one device"):
        backend_of(x, meta)
    with pytest.raises(ValueError, match="backend: expected one of"):
        backend_of(x, backend="cuda")
