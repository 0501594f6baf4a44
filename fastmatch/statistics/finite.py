"""Notes of which batch made which layer's statistics NaN or infinite, without waiting for the device in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmatch.statistics.moments import ChannelMoments

__all__ = ["FiniteNotes"]


class FiniteNotes:
    """Collects a flag for each batch and layer; :meth:`check` reads all of them at once.

    Attributes:
        batch: the number of the present batch, from 0.
    """

    def __init__(self) -> None:
        self.batch = -1
        self._flags: list[torch.Tensor] = []
        self._places: list[tuple[int, str]] = []

    def next_batch(self) -> None:
        """Begin the next batch."""
        self.batch += 1

    def see(self, layer: str, moments: ChannelMoments) -> None:
        """Note whether the moments are finite now."""
        if moments.count:
            self._flags.append(torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all())
            self._places.append((self.batch, layer))

    def see_all(self, layer: str, tensors: Sequence[torch.Tensor]) -> None:
        """Note for the tensors of all batches at once whether they are finite."""
        for batch, tensor in enumerate(tensors):
            self._flags.append(torch.isfinite(tensor.sum(dtype=torch.float64)))
            self._places.append((batch, layer))

    def check(self, whose: str) -> None:
        """Raise ValueError naming the first batch, and the first layer in it, whose statistics are not finite."""
        for device in {flag.device for flag in self._flags}:
            chosen = [k for k, flag in enumerate(self._flags) if flag.device == device]
            found = torch.stack([self._flags[k] for k in chosen])
            if not bool(found.all()):  # the device is waited for once
                batch, layer = self._places[chosen[int(found.long().argmin())]]
                raise ValueError(
                    f"data: batch {batch} (counted from 0) gives NaN or infinite activations at {layer!r} of {whose}; look "
                    "for them in the batch, or for overflow in the network"
                )
