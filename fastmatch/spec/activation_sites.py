"""Reading activations during a forward pass, at the operations that a trace has named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fastmatch._internal.checks import check_choice
from fastmatch._internal.dispatch_mode import DispatchMode
from fastmatch.spec.axes import ActivationSite
from fastmatch.spec.operations import counts, is_composite, op_name
from fastmatch.spec.running import plain_operations

__all__ = ["Site", "SiteReader"]

Site: TypeAlias = Literal["post", "pre"]
"""Where activations are read at a nonlinearity: its output ("post") or its input ("pre")."""


class SiteReader(DispatchMode):
    """Passes the tensors at ``sites`` to ``receive`` while a model runs inside it.

    Args:
        sites: where to read, from a traced spec.
        receive: called as ``receive(site, tensor)`` when the tensor is computed. It must copy what it
            keeps, because the model may write into the tensor afterwards.
        site: at a nonlinearity, read its output (``"post"``) or its input (``"pre"``).
        model: the model that will run. Operations are counted from its call on (or that of a part of it);
            None counts all of them.

    Raises:
        ValueError: ``site`` is another word.
        RuntimeError: the model ran another operation at a site, or ended before a site.
    """

    def __init__(
        self,
        sites: Iterable[ActivationSite],
        receive: Callable[[ActivationSite, torch.Tensor], None],
        *,
        site: Site = "post",
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_choice("site", site, Site)
        self._sites: dict[int, list[ActivationSite]] = {}
        for place in sites:
            self._sites.setdefault(place.op, []).append(place)
        self._receive, self._site = receive, site
        self._op = -1
        # The trace knows nothing of what prepares a batch, such as its copy to a GPU: the count begins with the model.
        self._parts = set() if model is None else {id(part) for part in model.modules()}
        self._waits: Any = None
        self._plain = plain_operations(model)

    def __enter__(self) -> SiteReader:
        self._plain.__enter__()
        if self._parts:
            self._waits = register_module_forward_pre_hook(self._begin)
        return super().__enter__()

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        if self._waits is not None and id(module) in self._parts:
            self._waits.remove()
            self._waits = None

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if self._waits is not None:
            self._waits.remove()
        self._plain.__exit__(exc_type, exc_value, traceback)
        if exc_type is None and self._sites and self._op < max(self._sites):
            last = max(self._sites)
            raise RuntimeError(
                f"the forward pass ended after {self._op + 1} operations, but the traced one read "
                f"{self._sites[last][0].op_name} as operation {last}; trace the model on inputs like the data"
            )

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Enter the mode inside its own handler, where torch has left it; the pass begins and ends elsewhere."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._waits is not None:
            return func(*args, **(kwargs or {}))
        if is_composite(func):
            with self._again():
                return func.decompose(*args, **(kwargs or {}))
        if not counts(func):
            return func(*args, **(kwargs or {}))
        self._op += 1
        sites = self._sites.get(self._op, ())
        for site in sites:
            if op_name(func) != site.op_name:
                raise RuntimeError(
                    f"operation {self._op} of the forward pass is {op_name(func)}, but the traced one was "
                    f"{site.op_name}; trace the model on inputs like the data"
                )
            if site.role == "consumed" or (site.role == "activation" and self._site == "pre"):
                self._receive(site, args[site.operand])
        out = func(*args, **(kwargs or {}))
        for site in sites:
            if site.role == "produced" or (site.role == "activation" and self._site == "post"):
                self._receive(site, out[0] if isinstance(out, (tuple, list)) else out)
        return out
