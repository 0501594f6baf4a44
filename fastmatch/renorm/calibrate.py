"""Calibration: forward passes over the data under hooks, in joint or sequential mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from fastmatch._internal.batches import Forward, device_of, evaluating
from fastmatch._internal.progress import progress_bar
from fastmatch._internal.shared_data import Share
from fastmatch._internal.tree import MergeTree
from fastmatch.renorm.endpoints import CallCounter
from fastmatch.renorm.few import SampleCount, count_of, no_variance
from fastmatch.renorm.hooks import CalibrationHook
from fastmatch.renorm.lockstep import Lockstep
from fastmatch.renorm.options import Mode
from fastmatch.statistics.finite import FiniteNotes
from fastmatch.statistics.moments import ChannelMoments

__all__ = ["Calibration", "calibrate"]

Measured: TypeAlias = dict[str, tuple[ChannelMoments, int]]
"""Name of a hook -> its moments, and how many batches it counted."""


class Calibration:
    """One model under calibration: its hooks, and the forward passes under them."""

    def __init__(self, model: nn.Module, hooks: Sequence[CalibrationHook], forward: Forward) -> None:
        self.model, self._forward = model, forward
        self._hooks = {hook.name: hook for hook in hooks}
        self._notes = FiniteNotes()
        self._samples: int | None = None
        """Of the batches that are run now."""
        self._goes_on = False
        """Whether other ranks, or other blocks of this one, have the batches before."""

    def joint(self, batch: Any) -> None:
        """Run one batch; every module is treated by the statistics of the batch."""
        counter = CallCounter()
        self._samples = count_of(batch)
        self._notes.next_batch()
        with self._treating(lambda name, tensor: self._treated(name, [tensor], counter.next(name))[0]):
            self._forward(self.model, batch)

    def sequential(self, batches: list[Any], progress: bool | None) -> None:
        """Run all batches side by side; every module is treated by the statistics of all of them."""
        counter, count = CallCounter(), SampleCount()
        for batch in batches:
            count.see(batch)
        self._samples = count.samples
        lockstep = Lockstep(lambda name, tensors: self._treated(name, tensors, counter.next(name)))
        passes = [partial(self._forward, self.model, batch) for batch in batches]
        with self._treating(lockstep.meet):
            meetings = lockstep.run(passes, device_of(self.model))
            for _ in progress_bar(meetings, "layer by layer", show=progress, total=len(self._hooks)):
                pass

    def _treated(self, name: str, tensors: list[torch.Tensor], call: int) -> list[torch.Tensor]:
        """Return the tensors of one call, corrected; refuse statistics of a single value, or that are not finite."""
        hook = self._hooks[name]
        news = hook.treat(tensors, call)
        if hook.lacks_variance(self._samples) and not self._goes_on:
            where = f"batch {self._notes.batch} (counted from 0)" if self._notes.batch >= 0 else "the whole"
            raise ValueError(no_variance(where, name))
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

    def start_at(self, batch: int) -> None:
        """Count batches from this one on, as errors name them."""
        self._notes.batch = batch - 1
        self._goes_on = batch > 0

    def take(self) -> Measured:
        """Return what the hooks have measured, on the host, and begin anew."""
        found = {name: (hook.moments.to("cpu"), hook.batches) for name, hook in self._hooks.items()}
        for hook in self._hooks.values():
            hook.moments, hook.batches = ChannelMoments(), 0
        self._goes_on = True
        return found

    def put(self, measured: Measured) -> None:
        """Take over what all ranks have measured."""
        device = device_of(self.model)
        for name, (moments, batches) in measured.items():
            self._hooks[name].moments, self._hooks[name].batches = moments.to(device), batches

    def check(self) -> None:
        """Raise ValueError if what was measured is not finite; the batch and the layer are named."""
        self._notes.check("the merge")

    def write(self) -> None:
        """Write what was measured into the model.

        Raises:
            ValueError: it is not finite; the batch and the layer are named, and nothing is written.
        """
        self.check()
        with torch.no_grad():
            for hook in self._hooks.values():
                hook.write()

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """Layer name -> (C,) True for the channels that keep gain one; known after :meth:`write`."""
        return {name: hook.kept for name, hook in self._hooks.items() if hook.kept is not None}


def calibrate(
    calibrations: Sequence[Calibration], data: Iterable[Any] | Share, mode: Mode, progress: bool | None
) -> None:
    """Read ``data`` once for all models, then write the results into them. Ranks share it in joint mode only."""
    with evaluating(*(calibration.model for calibration in calibrations)):
        if isinstance(data, Share):
            _joint_on_ranks(calibrations, data, progress)
        elif mode == "joint":
            for batch in data:
                for calibration in calibrations:
                    calibration.joint(batch)
        else:
            batches = list(data)
            for calibration in calibrations:
                calibration.sequential(batches, progress)
    for calibration in calibrations:
        calibration.write()


def _joint_on_ranks(calibrations: Sequence[Calibration], share: Share, progress: bool | None) -> None:
    """Run this rank's batches in joint mode; the moments of blocks are merged in a fixed tree."""
    tree: MergeTree[list[Measured]] = MergeTree(share.ranks, share.blocks, _merged)
    for calibration in calibrations:
        calibration.start_at(share.first)
    for block, batches in share.by_block("renormalization", progress):
        for batch in batches:
            for calibration in calibrations:
                calibration.joint(batch)
        tree.add(block, [calibration.take() for calibration in calibrations])
    for calibration in calibrations:
        calibration.check()
    share.ranks.exchange(
        None, "the end of the calibration"
    )  # an error of a rank is told before any waits for its moments
    for calibration, measured in zip(calibrations, tree.root(), strict=True):
        calibration.put(measured)


def _merged(first: list[Measured], second: list[Measured]) -> list[Measured]:
    for one, two in zip(first, second, strict=True):
        for name, (moments, batches) in two.items():
            kept, count = one[name]
            kept.merge(moments)
            one[name] = kept, count + batches
    return first
