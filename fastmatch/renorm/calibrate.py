"""Calibration: forward passes over the data under hooks, in joint or sequential mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, device_of, evaluating
from fastmatch._internal.progress import progress_bar
from fastmatch.renorm.endpoints import CallCounter
from fastmatch.renorm.hooks import CalibrationHook
from fastmatch.renorm.lockstep import Lockstep
from fastmatch.renorm.options import Mode
from fastmatch.statistics.finite import FiniteNotes

__all__ = ["Calibration", "calibrate"]


class Calibration:
    """One model under calibration: its hooks, and the forward passes under them."""

    def __init__(self, model: nn.Module, hooks: Sequence[CalibrationHook], forward: Forward) -> None:
        self.model, self._forward = model, forward
        self._hooks = {hook.name: hook for hook in hooks}
        self._notes = FiniteNotes()

    def joint(self, batch: Any) -> None:
        """Run one batch; every module is treated by the statistics of the batch."""
        counter = CallCounter()
        self._notes.next_batch()
        with self._treating(lambda name, tensor: self._treated(name, [tensor], counter.next(name))[0]):
            self._forward(self.model, batch)

    def sequential(self, batches: list[Any], progress: bool | None) -> None:
        """Run all batches side by side; every module is treated by the statistics of all of them."""
        counter = CallCounter()
        lockstep = Lockstep(lambda name, tensors: self._treated(name, tensors, counter.next(name)))
        passes = [partial(self._forward, self.model, batch) for batch in batches]
        with self._treating(lockstep.meet):
            meetings = lockstep.run(passes, device_of(self.model))
            for _ in progress_bar(meetings, "layer by layer", show=progress, total=len(self._hooks)):
                pass

    def _treated(self, name: str, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Return the tensors of one call, corrected; refuse statistics of a single value, or that are not finite."""
        hook = self._hooks[name]
        before = hook.moments.count
        news = hook.treat(tensors, call)
        if hook.needs_variance and hook.moments.count - before == 1:
            where = f"batch {self._notes.batch} (counted from 0)" if self._notes.batch >= 0 else "the whole"
            raise ValueError(
                f"data: {where} has one sample, which gives one value for each channel at {name!r}, so no variance; "
                'use larger batches (drop_last=True for a short last one), or mode="sequential" with several samples'
            )
        if len(tensors) == 1:
            self._notes.see(name, hook.moments)
        else:
            self._notes.see_all(name, tensors)
        return news

    @contextmanager
    def _treating(self, treat: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Pass the tensor of every hooked module to ``treat``, with the module's name."""
        handles = []
        try:
            for name, hook in self._hooks.items():
                handles.append(hook.register(partial(treat, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def write(self) -> None:
        """Write what was measured into the model.

        Raises:
            ValueError: it is not finite; the batch and the layer are named, and nothing is written.
        """
        self._notes.check("the merge")
        with torch.no_grad():
            for hook in self._hooks.values():
                hook.write()

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """Layer name -> (C,) True for the channels that keep gain one; known after :meth:`write`."""
        return {name: hook.kept for name, hook in self._hooks.items() if hook.kept is not None}


def calibrate(
    calibrations: Sequence[Calibration], data: Iterable[Any], mode: Mode, progress: bool | None
) -> None:
    """Read ``data`` once for all models, then write the results into them."""
    with evaluating(*(calibration.model for calibration in calibrations)):
        if mode == "joint":
            for batch in data:
                for calibration in calibrations:
                    calibration.joint(batch)
        else:
            batches = list(data)
            for calibration in calibrations:
                calibration.sequential(batches, progress)
    for calibration in calibrations:
        calibration.write()
