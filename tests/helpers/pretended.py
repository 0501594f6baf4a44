"""A GPU for tests: the real one, or CUDA without CUDA.

Without a GPU, tensors say that they are on one, hold CPU memory, and refuse to mix with CPU tensors. The library runs as it would on a GPU. Triton's launchers run in full and their kernels run
in the interpreter. What a GPU would refuse raises here: tensors of two devices in one operation, a launch while another
device is current, a grid beyond CUDA's limits, a float64 tensor of another device in a kernel. Copies to the host and
synchronisations are counted by the line of the library that asked for them, on a real GPU too.

Autograd's engine asks for streams, so the pretended GPU has no backward pass: ``gpu.has_autograd`` says so.
"""

from __future__ import annotations

import copy
import ctypes
import importlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Gpu", "Pretended", "Traffic", "gpus", "pretended_cuda", "real_cuda"]

ROOT = Path(__file__).parents[2]
SOURCES = (f"{ROOT}/fastmatch/", f"{ROOT}/kernels/")

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""What autograd asks of a device. torch's build for the CPU has none for CUDA."""

SYNCHRONISING = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount", "repeat_interleave"}  # fmt: skip
"""Operations whose result, or its size, the host has to wait for."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operations that take indices on the CPU too: torch copies them to the tensor's device."""


def _site() -> str:
    """The innermost line of the library on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCES):
            return f"{name[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Traffic:
    """What crossed to the host, who waited for the GPU, and which kernels were launched."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin to count anew."""
        self.bytes_to_host: Counter[str] = Counter()
        self.largest_to_host = 0
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        """Launches by kernel; of the pretended GPU only."""
        self.operations: Counter[str] = Counter()
        """Calls of the kernels' operations that went to Triton."""

    def to_host(self, tensor: torch.Tensor) -> None:
        """Note a copy to the host, which waits for the GPU."""
        size = tensor.numel() * tensor.element_size()
        self.bytes_to_host[_site()] += size
        self.largest_to_host = max(self.largest_to_host, size)
        self.waits[_site()] += 1

    def wait(self) -> None:
        """Note that the host waits for a number or a size."""
        self.waits[_site()] += 1

    @property
    def total(self) -> int:
        """Bytes that crossed to the host."""
        return sum(self.bytes_to_host.values())


class _State(threading.local):
    """The current device of a thread."""

    device = 0


TRAFFIC = Traffic()
_current = _State()


class Pretended(torch.Tensor):
    """A tensor that says ``cuda:k`` and whose memory is the CPU tensor ``inner``."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=device,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, device: torch.device) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Pretended({self.device}, {self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.inner = _inner(value)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy at {_site()}")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy at {_site()}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new: Any = Pretended(self.inner.detach().clone(), self.device)
            if getattr(self, "_is_param", False):
                new = nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new
        return memo[id(self)]


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


def _leaves(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of an ATen operation, those in lists too; the general function takes four times as long."""
    found: list[Any] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, (list, tuple)):
            found += x
        else:
            found.append(x)
    return found


def _on_cpu(x: Any) -> Any:
    """An argument of an ATen operation as the memory inside, or the CPU for a device."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(_on_cpu, x))
    return torch.device("cpu") if isinstance(x, torch.device) else _inner(x)


def _target(args: Any, kwargs: dict[str, Any], on_gpu: Sequence[torch.Tensor]) -> torch.device | None:
    """The device of the results; None for the CPU."""
    named = kwargs.get("device") or next((x for x in _leaves(args, {}) if isinstance(x, torch.device)), None)
    if named is not None:
        named = torch.device(named)
        if named.type != "cuda":
            return None
        return torch.device("cuda", _current.device if named.index is None else named.index)
    return on_gpu[0].device if on_gpu else None


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an ATen operation on the memory inside, as CUDA would: or raise, as it would."""
    name = func._schema.name.split("::")[1]
    tensors = [x for x in _leaves(args, kwargs) if isinstance(x, torch.Tensor)]
    pretended = [x for x in tensors if isinstance(x, Pretended)]
    target = _target(args, kwargs, pretended)
    if not pretended and target is None:
        return func(*args, **kwargs)
    plain = [x for x in tensors if not isinstance(x, Pretended)]
    _count(name, args, pretended, target)
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        plain = [x for x in plain if not any(x is y for y in indices)]
    is_copy = name in ("_to_copy", "copy_", "to")
    devices = {x.device for x in pretended} | {x.device for x in plain if x.ndim}
    if not is_copy and len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, got {sorted(map(str, devices))} in {name} at {_site()}"
        )
    # CUDA generators and pinned memory do not exist here.
    given = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "generator")}
    if "device" in kwargs:
        given["device"] = torch.device("cpu")
    to_cpu = [_on_cpu(x) for x in args]
    with _disable_current_modes():
        out = func(*to_cpu, **{name: _on_cpu(x) for name, x in given.items()})
        if name == "_to_copy" and target is not None and any(out is x for x in to_cpu):
            out = out.clone()
    if target is None:
        return out
    return _wrapped(func, args, kwargs, out, target)


def _count(name: str, args: Any, on_gpu: Sequence[torch.Tensor], target: torch.device | None) -> None:
    """Note what an operation with tensors on a GPU moves to the host or waits for."""
    if not on_gpu:
        return
    if name == "_local_scalar_dense" or name in SYNCHRONISING:
        TRAFFIC.wait()
    elif name == "_to_copy" and target is None:
        TRAFFIC.to_host(on_gpu[0])
    elif name == "copy_" and args[0].device.type == "cpu":
        TRAFFIC.to_host(args[1])
    elif name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
        TRAFFIC.wait()


def _wrapped(func: Any, args: Any, kwargs: dict[str, Any], out: Any, target: torch.device) -> Any:
    """``out`` as tensors on ``target``; an argument that was written to is itself the result."""
    written = [
        args[i] if i < len(args) else kwargs.get(s.name)
        for i, s in enumerate(func._schema.arguments)
        if s.alias_info is not None and s.alias_info.is_write
    ]

    def wrap(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(wrap, x))
        same = [w for w in written if isinstance(w, Pretended) and w.inner is x]
        fresh = Pretended(x, target) if isinstance(x, torch.Tensor) else x
        return same[0] if same else fresh

    return wrap(out)


class _Mode(TorchDispatchMode):
    """Sees operations that make new tensors on a pretended device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Counts what operations on a real GPU move to the host or wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = _leaves(args, kwargs or {})
        on_gpu = [x for x in flat if isinstance(x, torch.Tensor) and x.is_cuda]
        name = func._schema.name.split("::")[1]
        _count(name, args, on_gpu, _target(args, kwargs or {}, on_gpu))
        return func(*args, **(kwargs or {}))


class Gpu:
    """A device of a test: moves tensors and modules there."""

    def __init__(
        self, index: int, place: Callable[[torch.Tensor], torch.Tensor], *, has_autograd: bool
    ) -> None:
        self.device = torch.device("cuda", index)
        self.traffic = TRAFFIC
        self.has_autograd = has_autograd
        self.tensor = place
        """Returns a copy of a tensor on the device."""

    def module(self, model: nn.Module) -> nn.Module:
        """Return a copy of a module on the device."""
        moved = copy.deepcopy(model)
        for part in moved.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None:
                    value = self.tensor(parameter.detach())
                    part._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = self.tensor(buffer)
        return moved


def gpus() -> Any:
    """The contexts of every device that a test runs on: up to two real ones, or a pretended one that is not current."""
    if torch.cuda.is_available():
        return [partial(real_cuda, index=k) for k in range(min(2, torch.cuda.device_count()))]
    return [partial(pretended_cuda, index=1)]


@contextmanager
def real_cuda(index: int = 0) -> Iterator[Gpu]:
    """Use a real GPU, and count what crosses to the host."""
    import fastmatch_kernels._dispatch as dispatch

    TRAFFIC.clear()
    place = lambda x: x.detach().to(torch.device("cuda", index), copy=True)  # noqa: E731
    with ExitStack() as stack:
        for owner, name, value in _seen(dispatch):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_Watch())
        yield Gpu(index, place, has_autograd=True)


def _seen(dispatch: Any) -> list[tuple[Any, str, Any]]:
    """Patches that count the operations that go to Triton, and run them without torch's dispatcher."""
    real = dispatch.Operation._run

    def run(self: Any, arguments: Any, backend: str) -> Any:
        if backend == "triton":
            TRAFFIC.operations[self._name] += 1
        return real(self, arguments, backend)

    return [(dispatch.Operation, "_run", run), (dispatch, "_is_plain", lambda arguments: True)]


def _launch(real: Any) -> Any:
    """A launch of the interpreter that checks what CUDA and the driver would."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        for x in tensors:
            if not isinstance(x, Pretended):
                raise ValueError(
                    f"Pointer argument cannot be accessed from Triton (cpu tensor?) at {_site()}"
                )
            if x.device.index != _current.device:
                raise RuntimeError(
                    f"CUDA error: an illegal memory access was encountered: tensors of {x.device} in a launch "
                    f"on device {_current.device} at {_site()}"
                )
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False):
            if size > limit:
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: grid {grid} at {_site()}")
        TRAFFIC.launches[self.fn.__name__] += 1
        with _disable_current_modes():
            return real(self, *tree_map(_inner, args), **tree_map(_inner, kwargs))

    return call


@contextmanager
def _on(device: Any) -> Iterator[None]:
    """torch.cuda.device, for a pretended one."""
    index = device if isinstance(device, int) else torch.device(device).index
    before, _current.device = _current.device, _current.device if index is None else index
    try:
        yield
    finally:
        _current.device = before


@contextmanager
def pretended_cuda(capability: tuple[int, int] = (9, 0), index: int = 0) -> Iterator[Gpu]:
    """Pretend to have GPUs of this compute capability; yields the one of number ``index``.

    Triton's kernels run in its interpreter, so TRITON_INTERPRET=1 must be set before triton is imported.
    """
    from triton.runtime.interpreter import GridExecutor

    import fastmatch.renorm.lockstep as lockstep
    import fastmatch_kernels._dispatch as dispatch
    from fastmatch_kernels._triton import tiles

    real_thread = lockstep._as_this_thread

    def in_thread(run: Any, device: torch.device) -> Any:
        wrapped = real_thread(run, device)

        def inner() -> None:
            with _Mode():
                wrapped()

        return inner

    def interpreter(device: torch.device) -> tiles.Target:
        chip = real_target(device)  # raises for a chip without kernels
        assert chip.backend == "cuda"
        return tiles.INTERPRETER

    real_target = tiles.target_of
    _register_guard()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "device", _on),
        (torch.cuda, "current_device", lambda: _current.device),
        (torch.cuda, "current_stream", lambda device=None: torch.device("cuda", _index(device))),
        (torch.cuda, "stream", _on),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        *_seen(dispatch),
        (dispatch, "_without_kernels", {}),
        (lockstep, "_as_this_thread", in_thread),
        (GridExecutor, "__call__", _launch(GridExecutor.__call__)),
    ]
    patches += [(module, "target_of", interpreter) for module in _launchers()]
    TRAFFIC.clear()
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        # A torch built with CUDA would call cuDNN for these tensors, which lie on the CPU.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_Mode())
        device = torch.device("cuda", index)
        yield Gpu(index, lambda x: Pretended(x.detach().clone(), device), has_autograd=False)


@cache
def _register_guard() -> None:
    """Give torch a guard for CUDA devices that does nothing; it takes a C++ compiler and some seconds."""
    home, compiler = Path(torch.__file__).parent, shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("pretended_cuda: needs a C++ compiler (c++ or g++) on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
        subprocess.run([compiler, str(source), "-o", str(library), *options], check=True)
        ctypes.CDLL(str(library))


def _index(device: Any) -> int:
    if device is None:
        return _current.device
    found = device if isinstance(device, int) else torch.device(device).index
    return _current.device if found is None else found


def _launchers() -> list[Any]:
    """Every module that asks which GPU it launches on."""
    from fastmatch_kernels._triton import tiles

    found = []
    for path in sorted((ROOT / "kernels" / "fastmatch_kernels").rglob("*.py")):
        if path.stem.endswith("triton") or "_triton" in path.parts:
            name = ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
            module = importlib.import_module(name.removesuffix(".__init__"))
            if getattr(module, "target_of", None) is tiles.target_of:
                found.append(module)
    return found
