import os

import pytest
import torch

from fastmatch_kernels import ops
from fastmatch_kernels.ops import backend_of


@pytest.fixture
def run(programs):
    def run(code, **environment):
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return programs.run(code, environment={**clean, **environment})

    return run


def test_importing_loads_neither_triton_nor_numba(run):
    done = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastmatch_kernels.ops\nfrom fastmatch import *\n"
        "found = {'triton', 'numba'} & (set(sys.modules) - before)\n"
        "assert not found, found\n"
    )
    assert done.returncode == 0, done.stderr


def test_triton_asked_for_on_cpu_tensors_is_an_error_not_another_backend(run):
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


def _negative(x):
    """The same numbers, as torch gives the imaginary part of a conjugate: memory holds their negatives."""
    return torch._neg_view(-x)


CALLS = {
    "channel_affine": lambda t, x, a, b: ops.channel_affine(t(x), torch.zeros(6), t(torch.ones(6))),
    "moments": lambda t, x, a, b: [ops.moments(t(x), t(x)).settle().covariance()],
    "permute_merge": lambda t, x, a, b: [ops.permute_merge([t(a), t(b)], [0.3, 0.7])],
    "gain": lambda t, x, a, b: [ops.gain([(t(a), t(b))])],
    "row_topk": lambda t, x, a, b: ops.row_topk([(t(a), t(b))], t(b[:, 0]), 3),
    "row_min": lambda t, x, a, b: ops.row_min([(t(a), t(b))], t(b[:, 0])),
    "row_softmin": lambda t, x, a, b: ops.row_softmin([(t(a), t(b))], t(b[:, 0]), 0.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_negative_views_are_read_as_the_numbers_that_they_stand_for(name):
    arguments = torch.randn(5, 6, 4, 4), torch.randn(20, 8), torch.randn(20, 8)
    got, wanted = (CALLS[name](change, *arguments) for change in (_negative, lambda x: x))
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


def test_a_negative_view_is_written_as_the_numbers_that_it_stands_for():
    a, out = torch.randn(7, 5), _negative(torch.zeros(7, 5))
    ops.permute_merge([a, a], [0.5, 0.5], out=out)
    assert torch.equal(out.resolve_neg(), a)


def test_kernels_run_where_numba_is_told_not_to_compile(run):
    done = run(
        "import numpy as np, torch\n"
        "from fastmatch_kernels.ops import permute_merge\n"
        "from fastmatch.assignment import solve\n"
        "a = torch.randn(6, 6)\n"
        "assert torch.equal(permute_merge([a, a], [0.5, 0.5]), a)\n"
        "print(solve(np.array([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]])).objective)",
        NUMBA_DISABLE_JIT="1",
    )
    assert done.stdout.split() == ["5.0"], done.stderr


def test_calls_inside_a_modes_own_handler_take_the_short_way():
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastmatch_kernels._dispatch import _is_plain

    found = {}

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found["in the handler"] = _is_plain((args[0],))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Watching():
        found["under the mode"] = _is_plain((x,))
        x.add(1)
    assert found == {"in the handler": True, "under the mode": False}
    assert _is_plain((x,))
