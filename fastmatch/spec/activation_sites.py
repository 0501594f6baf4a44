"""Reading activations during a forward pass, at the operations that a trace has named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fastmatch._internal.allowed import Site
from fastmatch._internal.checks import check_choice
from fastmatch._internal.dispatch_mode import DispatchMode
from fastmatch.spec.axes import ActivationSite
from fastmatch.spec.operations import is_composite, op_name, tensors_in
from fastmatch.spec.running import plain_operations
from fastmatch.spec.spots import Spot, Spots

__all__ = ["Site", "SiteReader"]


class SiteReader(DispatchMode):
    """Passes the tensors at ``sites`` to ``receive`` while a model runs inside it.

    A site is found by what its operation belongs to (:class:`fastmatch.spec.spots.Spot`). A pass that takes another path
    elsewhere is read all the same. A site that the pass does not reach is not read: :attr:`reached` says which were.

    Args:
        sites: where to read, from a traced spec.
        receive: called as ``receive(site, tensor)`` when the tensor is computed. It must copy what it
            keeps, because the model may write into the tensor afterwards.
        model: the model that will run, or a part of which will run.
        site: at a nonlinearity, read its output (``"post"``) or its input (``"pre"``).

    Attributes:
        reached: the sites that were read.

    Raises:
        ValueError: ``site`` is another word.
    """

    def __init__(
        self,
        sites: Iterable[ActivationSite],
        receive: Callable[[ActivationSite, torch.Tensor], None],
        model: nn.Module,
        *,
        site: Site = "post",
    ) -> None:
        super().__init__()
        check_choice("site", site, Site)
        self._sites: dict[Spot, list[ActivationSite]] = {}
        for place in sites:
            spot = Spot(Spots.kind_of(place.op_name), place.module, place.weight, place.call)
            self._sites.setdefault(spot, []).append(place)
        self._receive, self._site = receive, site
        self._model, self._spots = model, Spots(model)
        self._open = ExitStack()
        self.reached: set[ActivationSite] = set()

    def __enter__(self) -> SiteReader:
        self._open.enter_context(plain_operations(self._model))
        self._open.enter_context(self._spots.watched())
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        self._open.close()

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
        kwargs = kwargs or {}
        if is_composite(func):
            with self._again():
                return func.decompose(*args, **kwargs)
        spot = self._spots.at(op_name(func), args, kwargs)
        sites = self._sites.get(spot, ())
        for site in sites:
            if site.role == "consumed" or (site.role == "activation" and self._site == "pre"):
                self._read(site, self._operand(site, op_name(func), args, kwargs))
        out = func(*args, **kwargs)
        self._spots.after(out, is_view=func.is_view)
        for site in sites:
            if site.role == "produced" or (site.role == "activation" and self._site == "post"):
                self._read(site, out[0] if isinstance(out, (tuple, list)) else out)
        return out

    def _operand(self, site: ActivationSite, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        """Return the operand that holds activations; of another kind of product, the first that is no parameter."""
        if name.rstrip("_") == site.op_name.rstrip("_") and site.operand < len(args):
            return args[site.operand]
        return next(t for t in tensors_in((args, kwargs)) if self._spots.state_behind(t) is None)

    def _read(self, site: ActivationSite, tensor: torch.Tensor) -> None:
        """Hand on a tensor in the rank of the traced one: other products flatten the samples, or do not."""
        if site.rank and tensor.ndim != site.rank and Spots.kind_of(site.op_name) == "product":
            tensor = tensor.reshape(*[-1] * (site.rank > 1), *[1] * (site.rank - 2), tensor.shape[-1])
        self.reached.add(site)
        self._receive(site, tensor)
