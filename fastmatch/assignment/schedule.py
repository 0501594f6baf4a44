"""When the phases of the list solvers run, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastmatch._internal.checks import check_fraction, check_integer, check_number

__all__ = ["AuctionSchedule", "DenseSchedule", "ListSchedule", "check_fields"]


FRACTIONS = {"short_leaves", "dead_imbalance"}
"""Fields that are fractions, in addition to all those that end in ``_above``."""


def check_fields(name: str, fields: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ValueError unless counts are whole and other fields finite, of at least 0, and fractions at most 1."""
    for field, value in fields.items():
        if isinstance(defaults[field], int):
            check_integer(f"{name}.{field}", value)
        elif field in FRACTIONS or field.endswith("_above"):
            check_fraction(f"{name}.{field}", value)
        else:
            check_number(f"{name}.{field}", value)


@dataclass(frozen=True)
class AuctionSchedule:
    """What both list solvers decide. Both first run a short auction at a small eps and, if that fails, eps-scaling."""

    auction_above: float
    """Fraction of the rows: if reduction leaves more of them free, a short auction runs before the paths."""
    short_eps: float
    """The short auction's eps; the unit is the solver's."""
    short_bids: int
    """Bids per row in a short auction at most: more are a price war, because eps is too small."""
    scaled_bids: int
    """Bids per row in the scaled auction's first phase, after which eps is raised."""
    lower_factor: float
    """The factor by which eps falls from one phase of the scaled auction to the next one."""
    last_eps: float
    """The eps where the scaled auction ends, in standard deviations of the listed costs."""
    short_leaves: float = 1 / 1024
    """Fraction of the rows: a short auction ends when no more of them are free. A path finds their columns sooner."""
    raises: int = 8
    """How often the scaled auction's first phase may raise eps."""
    raise_factor: float = 5.0
    """The factor by which it does."""
    phase_bids: int = 1000
    """Bids per row in a phase of the scaled auction. A phase that needs more has met the limits of float64."""

    def __post_init__(self) -> None:
        fields = asdict(self)
        check_fields(
            "schedule", fields, {name: type(self).__dataclass_fields__[name].default for name in fields}
        )
        for name in ("lower_factor", "raise_factor"):
            check_number(f"schedule.{name}", fields[name], least=1.0, exclusive=True)


@dataclass(frozen=True)
class DenseSchedule(AuctionSchedule):
    """The schedule of :class:`DenseShortlists`. ``short_eps`` is in mean differences between a row's best two costs."""

    auction_above: float = 0.2
    short_eps: float = 0.15
    short_bids: int = 64
    scaled_bids: int = 64
    lower_factor: float = 10.0
    last_eps: float = 0.011
    tied_above: float = 0.5
    """Fraction of the rows: if column reduction leaves more of them free, columns may share their minima.
    Random entries leave 1/e."""
    tie_misses: int = 16
    """Rows without a shared minimum, beyond those with one, after which the search for shared minima ends."""
    dead_imbalance: float = 1 / 16
    """Fraction of the live rows: if the numbers of constant rows and columns differ by more, both are cut out."""
    repeat_above: float = 0.1
    """Fraction of the rows: if a short auction and row reduction leave more of them free, another one runs. Also the
    fraction of outdated lists above which these are read again first."""
    short_phases: int = 6
    """Short auctions at most."""
    short_factor: float = 0.2
    """The factor from one short auction's eps to the next one's."""
    war_above: float = 1 / 32
    """Fraction of the rows: if a short auction ends with more of them free, it was a price war, and eps-scaling begins."""
    reads_before_scaling: int = 32
    """Reads of the whole matrix that shortest paths may cost before eps-scaling begins."""


@dataclass(frozen=True)
class ListSchedule(AuctionSchedule):
    """The schedule of :class:`CandidateLists`. ``short_eps`` is in standard deviations of the listed costs."""

    auction_above: float = 0.05
    short_eps: float = 0.02
    short_bids: int = 16
    scaled_bids: int = 16
    lower_factor: float = 8.0
    last_eps: float = 0.015
    restart_above: float = 0.3
    """Fraction of the rows: if the first steps leave more of them free, the solver begins again from Sinkhorn's duals."""
    scaling_above: float = 0.3
    """Fraction of the rows: if more of them are free even then, eps-scaling runs before the paths."""
    refills: float = 1.0
    """Refills per row that shortest paths may cost before the solver begins again from Sinkhorn's duals, or gives up."""
    sweeps: int = 16
    """Rounds of refills after which the lists of a matrix are given up."""
    tied_above: float = 0.1
    """Fraction of the rows: if more of their lists end among equal entries, the lists of a matrix are given up."""
    first_temperature: float = 1.0
    """Sinkhorn's first temperature, in standard deviations of the costs: see bench/results/initial_duals.md."""
    last_temperature: float = 0.003
    """Sinkhorn's last temperature, in the same unit."""
    temperatures: int = 40
    """Steps from the first temperature to the last."""
    relaxation: float = 1.8
    """Over-relaxation of Sinkhorn's steps, between 0 and 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first_temperature", "last_temperature", "relaxation"):
            check_number(f"schedule.{name}", getattr(self, name), exclusive=True)
        if self.last_temperature > self.first_temperature:
            raise ValueError(
                f"schedule.last_temperature: expected at most first_temperature, {self.first_temperature:g}; "
                f"got {self.last_temperature!r}"
            )
        check_integer("schedule.temperatures", self.temperatures, 1)
        if self.relaxation >= 2.0:
            raise ValueError(
                f"schedule.relaxation: expected a number between 0 and 2; got {self.relaxation!r}"
            )
