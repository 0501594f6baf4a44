"""How an operation reaches its backend, and the checks that all operations share.

An operation is a folder. Its ``__init__`` holds the public function, which checks its arguments once. ``reference``,
``cpu`` and ``triton`` each have a function of the operation's name that takes the checked arguments as one tuple.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = [
    "Backend",
    "Operation",
    "Precision",
    "RowPrecision",
    "backend_of",
    "beside",
    "check_choice",
    "check_floating",
    "check_range",
]

Backend: TypeAlias = Literal["triton", "cpu", "reference"]
Precision: TypeAlias = Literal["ieee", "fp16", "fp16x3"]
RowPrecision: TypeAlias = Literal["ieee", "fp16", "fp16x3", "bf16"]
"""Those of row reductions. bf16 screens on the CPU: exact results from a first pass in bfloat16."""


TRITON = (3, 6)
"""The oldest Triton whose compiler and launcher the kernels were tried with."""

_without_kernels: dict[torch.device, bool] = {}
"""GPUs that were asked about, and whether they run plain torch."""


def backend_of(*tensors: Tensor, backend: Backend | None = None) -> Backend:
    """Return the backend that ``tensors`` go to.

    On a GPU that cannot run the Triton kernels this is "reference", with one warning that says why.

    Raises:
        ValueError: an unknown backend, tensors on several devices, or a device without a backend.
    """
    if backend is not None:
        check_choice("backend", backend, Backend)
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected one device, got {sorted(map(str, devices))}")
    device = next(iter(devices))
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' needs CPU tensors, got {device}")
    if backend is not None:
        return backend
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}; backend='reference' runs anywhere")
    if device.type == "cpu":
        return "cpu"
    return "triton" if _has_kernels(device) else "reference"


def _has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a GPU; the first GPU without them is warned of."""
    if torch.compiler.is_compiling():
        return True
    if device not in _without_kernels:
        reason = _missing(device)
        if reason is not None and not any(_without_kernels.values()):
            warnings.warn(
                f"fastmatch: {device} runs plain torch in place of the Triton kernels, which is slower: {reason}",
                stacklevel=4,
            )
        _without_kernels[device] = reason is not None
    return not _without_kernels[device]


def _missing(device: torch.device) -> str | None:
    """What the Triton kernels lack on a GPU, or None."""
    needed = ".".join(map(str, TRITON))
    try:
        import triton
    except ImportError:
        return f"triton is not installed (pip install 'triton>={needed}')"
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < TRITON:
        return f"triton {triton.__version__} is older than {needed}"
    from fastmatch_kernels._triton.tiles import target_of

    try:
        target_of(device)
    except ValueError as error:
        return str(error)
    return None


class Operation:
    """Runs checked arguments on a backend, directly or through a custom op of torch.

    Plain tensors in eager mode go straight to the backend: the first call of a custom op imports torch's compiler, most
    of a second, and every call costs some microseconds. Under torch.compile, autograd, a dispatch mode or with a tensor
    subclass the custom op ``fastmatch::<name>`` is called. Backends are imported when they are first used.

    Args:
        name: of the function in each backend's module.
        arguments: a NamedTuple class; its annotations are the custom op's schema.
        fake: arguments -> empty results, for torch.compile.
        returns: annotation of the result.
        mutates: names of the arguments that are written to.
        folder: of the backends' modules, if it is not the name.
    """

    def __init__(
        self,
        name: str,
        arguments: type[tuple[Any, ...]],
        fake: Callable[..., Any],
        *,
        returns: Any = None,
        mutates: Iterable[str] = (),
        folder: str | None = None,
    ) -> None:
        self._name = name
        self._folder = folder or name
        self._mutates = tuple(mutates)

        def call(*given: Any) -> Any:
            *values, backend = given
            return self._run(arguments(*values), backend)  # a NamedTuple, whose fields no checker knows here

        hints = {**get_type_hints(arguments), "backend": str}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=hint) for name, hint in hints.items()],
            return_annotation=returns,
        )
        call.__signature__ = signature  # what torch infers the schema from
        self._custom_op = torch.library.custom_op(f"fastmatch::{name}", call, mutates_args=self._mutates)
        self._custom_op.register_fake(lambda *given: fake(arguments(*given[:-1])))

    def _function(self, backend: str) -> Callable[[Any], Any]:
        return getattr(importlib.import_module(f"fastmatch_kernels.{self._folder}.{backend}"), self._name)

    def _run(self, arguments: tuple[Any, ...], backend: str) -> Any:
        function = self._function(backend)
        if backend == "triton":
            first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
            if first.device.type == "cuda":
                # Triton launches on the current device, whatever device the tensors are on.
                with torch.cuda.device(first.device):
                    return function(arguments)
        return function(arguments)

    def __call__(self, arguments: tuple[Any, ...], backend: str) -> Any:
        if not torch.compiler.is_compiling() and any(x.is_neg() for x in _tensors(arguments)):
            plain = type(arguments)(*map(_resolved, arguments))
            result = self(plain, backend)
            for name in self._mutates:
                if getattr(arguments, name) is not None:
                    getattr(arguments, name).copy_(getattr(plain, name))
            return result
        if _is_plain(arguments):
            return self._run(arguments, backend)
        return self._custom_op(*arguments, backend)


def _is_plain(arguments: Iterable[Any]) -> bool:
    """Whether nothing traces, differentiates or intercepts what is done with the tensors among ``arguments``."""
    # A mode's own handler runs outside of it, where tensors are plain.
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    return not any(type(x) is not Tensor or x.requires_grad for x in _tensors(arguments))


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for value in arguments:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, Tensor):
                yield x


def _resolved(value: Any) -> Any:
    """Return an argument with tensors whose memory holds what they say: not those of ``x.conj().imag``."""
    if isinstance(value, (list, tuple)):
        return [_resolved(x) for x in value]
    return value.resolve_neg() if isinstance(value, Tensor) else value


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError for a value that is not one of the words of ``choices``, a ``Literal`` type."""
    words = get_args(choices)
    if value not in words:
        raise ValueError(f"{name}: expected one of {words}, got {value!r}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError for what is not a floating point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError for an index with entries outside 0 to ``size - 1``."""
    # Kernels do not check bounds. Reading two numbers back costs a GPU far less than a wild read.
    if index.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{name}: expected entries of 0..{size - 1}, got {low}..{high}")


def beside(index: Tensor | None, tensor: Tensor) -> Tensor | None:
    """Return ``index`` on the device of ``tensor`` if it is on the CPU, where checking it costs a GPU no wait."""
    if index is None or index.device.type != "cpu" or tensor.device.type == "cpu":
        return index
    return index.to(tensor.device, non_blocking=True)
