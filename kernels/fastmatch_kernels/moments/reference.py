"""Streaming moments of two models' activations: the state, what is derived from it, and the plain update.

With a fixed shift ``s`` per channel (the mean of the first samples seen), a batch adds

    sum += sum_t (a_t - s),  square += sum_t (a_t - s)^2,  cross += sum_t (a_t - s_a)(b_t - s_b)^T

so batches merge without loss, and no large mean is ever squared. States with different shifts merge by the
formula of Chan, Golub and LeVeque (1983).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

__all__ = ["CROSS", "Moments", "MomentsArguments", "moments_update", "samples_by_channels"]

CROSS = ("ab", "aa", "bb")
"""Cross products that can be kept: between the models, and within each (for CCA and zip)."""

SHIFT_SAMPLES = 1024
"""Samples that the shift is the mean of. Any shift gives the same moments; this one keeps numbers small."""


def samples_by_channels(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(samples, C): every dimension but ``dim`` is samples."""
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def _shift_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    front = x.movedim(dim, -1)
    per_entry = max(front[:1].numel() // max(x.shape[dim], 1), 1) if front.ndim > 1 else 1
    rows = front[: -(-SHIFT_SAMPLES // per_entry)] if front.ndim > 1 else front
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    return rows.reshape(-1, x.shape[dim]).to(work).mean(dim=0)


class MomentsArguments(NamedTuple):
    """Checked arguments of an update: one batch, and the accumulators that backends add to in place.

    Whatever belongs to b is None if there is one model; a cross product that is not kept is None.
    """

    a: torch.Tensor  # (B, C, *spatial) with channels at dim, any strides
    b: torch.Tensor | None  # (B, C', *spatial)
    dim: int
    shift_a: torch.Tensor  # (C,)
    shift_b: torch.Tensor | None  # (C',)
    stats_a: torch.Tensor  # (3, C) float64
    stats_b: torch.Tensor | None  # (3, C') float64
    ab: torch.Tensor | None  # (C, C') float64
    aa: torch.Tensor | None  # (C, C) float64
    bb: torch.Tensor | None  # (C', C') float64
    precision: str

    @property
    def models(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(activations, shift, statistics) of each model."""
        found = [(self.a, self.shift_a, self.stats_a)]
        if self.b is not None and self.shift_b is not None and self.stats_b is not None:
            found.append((self.b, self.shift_b, self.stats_b))
        return found

    @property
    def products(self) -> list[tuple[torch.Tensor, int, int]]:
        """(accumulator, model of its rows, model of its columns) of each cross product that is kept."""
        every = ((self.ab, 0, 1), (self.aa, 0, 0), (self.bb, 1, 1))
        return [(out, i, j) for out, i, j in every if out is not None]


@dataclass
class Moments:
    """Pooled statistics of one or two models' activations at one place.

    Attributes:
        count: samples seen (batch times positions).
        shifts: per model (C,), float32 or float64.
        stats: per model (3, C) float64: shifted sum, shifted sum of squares, and the number of samples in
            which the unit was off (``x <= 0``).
        cross: ``"ab"``, ``"aa"``, ``"bb"`` -> (C, C') float64, shifted cross products, where asked for.
        pending: per model (room, C), whose first ``waiting`` rows are samples of small batches that are counted
            but not yet added: an n x n accumulator is not worth passing through for a few. Whatever is derived
            settles them first; :meth:`settle` before reading ``stats`` or ``cross`` themselves.
    """

    count: int = 0
    shifts: tuple[torch.Tensor, ...] = ()
    stats: tuple[torch.Tensor, ...] = ()
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    pending: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    waiting: int = 0
    add: Callable[..., None] | None = field(default=None, repr=False)
    """Adds pending rows to the state; set by the code that leaves rows pending."""

    def settle(self) -> Moments:
        """Adds the pending rows, frees their memory, and returns the state."""
        self.add_pending()
        self.pending = ()
        return self

    def add_pending(self) -> None:
        """Adds the pending rows; their memory is kept for the next ones."""
        if self.waiting:
            assert self.add is not None
            rows = [x[: self.waiting] for x in self.pending]
            self.waiting = 0
            self.add(self, *rows)

    @classmethod
    def empty(
        cls, a: torch.Tensor, b: torch.Tensor | None = None, *, dim: int = 1, cross: Iterable[str] = ("ab",)
    ) -> Moments:
        """A state with no samples, shifted by the mean of the first samples of ``a`` and ``b``."""
        models = [a] if b is None else [a, b]
        shifts = tuple(_shift_of(x, dim) for x in models)
        options = {"dtype": torch.float64, "device": a.device}
        channels = {"a": a.shape[dim], "b": models[-1].shape[dim]}
        with torch.inference_mode(False):  # else no later batch outside of it could be added
            stats = tuple(torch.zeros(3, x.shape[dim], **options) for x in models)
            products = {c: torch.zeros(channels[c[0]], channels[c[1]], **options) for c in cross}
        return cls(0, shifts, stats, products)

    def merge(self, other: Moments) -> Moments:
        """Both states' samples pooled (Chan, Golub and LeVeque 1983), as if read by one."""
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        self.settle()
        other.settle()
        n = other.count
        deltas = [
            o.double() - s.double() for s, o in zip(self.shifts, other.shifts, strict=True)
        ]  # other's shift as seen from ours
        stats = []
        for mine, theirs, delta in zip(self.stats, other.stats, deltas, strict=True):
            total, square, off = theirs
            stats.append(
                mine + torch.stack((total + n * delta, square + 2 * delta * total + n * delta.square(), off))
            )
        cross = {}
        for name, mine in self.cross.items():
            i, j = (0 if letter == "a" else 1 for letter in name)
            sum_i, sum_j = other.stats[i][0], other.stats[j][0]
            moved = torch.addr(other.cross[name], deltas[i], sum_j).addr_(sum_i + n * deltas[i], deltas[j])
            cross[name] = moved.add_(mine)
        return Moments(self.count + n, self.shifts, tuple(stats), cross)

    def mean(self, model: int = 0) -> torch.Tensor:
        """(C,) float64."""
        self.settle()
        return self.shifts[model].double() + self.stats[model][0] / max(self.count, 1)

    def variance(self, model: int = 0) -> torch.Tensor:
        """(C,) float64, population variance."""
        self.settle()
        total, square, _ = self.stats[model]
        return ((square - total.square() / max(self.count, 1)) / max(self.count, 1)).clamp(min=0)

    def off(self, model: int = 0) -> torch.Tensor:
        """(C,) int64: in how many samples the unit was off; a dead unit is off in all ``count``."""
        self.settle()
        return self.stats[model][2].to(torch.int64)

    def covariance(self, name: str = "ab") -> torch.Tensor:
        """Population covariance of the channels, float64."""
        self.settle()
        i, j = (0 if letter == "a" else 1 for letter in name)
        centred = torch.addr(
            self.cross[name], self.stats[i][0], self.stats[j][0], alpha=-1.0 / max(self.count, 1)
        )
        return centred.div_(max(self.count, 1))

    def inner(self, name: str = "ab") -> torch.Tensor:
        """Inner product per sample of the activations themselves, float64."""
        i, j = (0 if letter == "a" else 1 for letter in name)
        return self.covariance(name).addr_(self.mean(i), self.mean(j))

    def correlation(self, name: str = "ab") -> torch.Tensor:
        """Pearson correlation, float64; 0 with a channel that has no variance above float32 rounding."""
        result = self.covariance(name)
        for position, letter in enumerate(name):
            model = 0 if letter == "a" else 1
            variance, mean = self.variance(model), self.mean(model)
            dead = variance <= (1e-6 * mean).square()
            scale = torch.where(dead, 0.0, variance.clamp(min=1e-300).rsqrt())
            result *= scale[:, None] if position == 0 else scale[None, :]
        return result


def moments_update(arguments: MomentsArguments) -> None:
    """Add in float64 throughout."""
    shifted = []
    for x, shift, stats in arguments.models:
        rows = samples_by_channels(x.double(), arguments.dim)
        stats[2] += (rows <= 0).sum(dim=0)
        rows = rows - shift.double()
        stats[0] += rows.sum(dim=0)
        stats[1] += rows.square().sum(dim=0)
        shifted.append(rows)
    for out, i, j in arguments.products:
        out += shifted[i].T @ shifted[j]
