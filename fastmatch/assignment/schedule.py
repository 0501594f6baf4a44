"""When the phases of the list solvers run, and for how long."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastmatch._internal.checks import check_fraction, check_integer, check_number

__all__ = ["AuctionSchedule", "DenseSchedule", "ListSchedule", "check_fields"]


FRACTIONS = {
    "short_leaves",
    "war_leaves",
    "better_minima",
    "better_centres",
    "scaling_share",
    "copied_below",
    "accepted_below",
    "least_settled",
}
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
    """The schedule of :class:`DenseShortlists`. ``short_eps`` is in typical differences between a row's best two costs."""

    auction_above: float = 0.12
    short_eps: float = 0.15
    short_bids: int = 32
    scaled_bids: int = 64
    lower_factor: float = 10.0
    last_eps: float = 0.011
    crowded_above: float = 0.42
    """Fraction of the rows: if more of them find their best columns taken, other first duals are tried. Random entries
    leave 1/e."""
    accepted_below: float = 0.15
    """Fraction of the rows: other first duals that leave no more of them free are taken at once, others only after a price
    war."""
    better_minima: float = 0.7
    """Fraction of the free rows that the columns' minima may leave to be used as first duals."""
    better_centres: float = 0.85
    """The same for the columns' centres and means."""
    tail: float = 8.0
    """Distance of the least column minimum from their median, in distances between their quartiles, up to which minima
    are usual first duals."""
    copied_below: float = 0.55
    """Fraction of the columns: if no more are different, one column stands for all its copies."""
    listed_above: float = 0.2
    """Fraction of the rows: if more of them are free, lists are read before the first bids; else only if reduction by whole
    rows leaves many."""
    extra_steps: float = 0.5
    """Steps of a pass of row reduction beyond one per free row, per row of the problem."""
    busy_above: float = 0.85
    """Fraction of the waiting rows: row reduction goes on while as many bids as a quarter of the rows leave no more of
    them waiting."""
    reduced_above: float = 1 / 64
    """Fraction of the rows: if row reduction that went on leaves no more of them free, no auction runs."""
    short_scans: float = 1.5
    """Scans per row: if paths from zeros are expected to take no more, no other first duals are tried."""
    short_tied_scans: float = 4.0
    """The same if half of the rows have ties for their best column: neither other duals nor auctions help much then."""
    dear_bid_reads: float = 0.25
    """Reads per bid above which bids over whole rows are quicker than over lists."""
    dear_bids: float = 8.0
    """Bids that a row may take in a rectangle before lists or a path are quicker."""
    ends_at_once: float = 1.25
    """Scans per free row: if paths after row reduction are expected to take no more, no auction is tried."""
    few_scans: float = 1.0
    """Scans per row up to which paths over whole rows are quicker than lists, which have to be read first."""
    repeat_above: float = 0.1
    """Fraction of the rows: if a short auction and row reduction leave more of them free, another one runs."""
    refined_above: float = 0.4
    """Fraction of the rows: if row reduction after a later phase leaves more of them free, the auction's matching is kept instead,
    and duals are refined for it."""
    short_phases: int = 6
    """Short auctions at most."""
    short_factor: float = 0.2
    """The factor from one short auction's eps to the next one's."""
    slow_above: float = 0.95
    """Fraction of the waiting rows: if a bid per row leaves more of them waiting, the phase ends."""
    slow_above_others: float = 0.75
    """The same while other first duals are at hand."""
    least_settled: float = 1 / 512
    """Fraction of the rows: if a bid per row settles no more of them, the phase ends."""
    war_above: float = 1 / 32
    """Fraction of the rows: if a phase ends with more of them waiting, it was a price war."""
    war_leaves: float = 0.85
    """Fraction of the rows free before the auction: a price war that leaves more of them free is undone."""
    slice_steps: int = 8
    """Steps of paths over lists, per row, between two looks at how they do."""
    list_steps: float = 4.0
    """Steps of paths over lists in the time of a scan of a row."""
    few_reads: float = 0.25
    """Reads per row that paths over lists may cost in any case."""
    dear_reads: float = 0.2
    """Reads per step of a path above which whole rows are quicker than lists."""
    scans_before_scaling: int = 60
    """Scans per row: if paths are expected to take more, eps-scaling is tried first."""
    scaling_share: float = 1.0
    """Fraction of the paths' expected work that eps-scaling may take before it is given up."""
    bid_entries: int = 64
    """Entries of a row that are scanned in the time of a bid."""


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
    copied_above: float = 0.5
    """Fraction of the rows: if more of them have two equal best entries, the lists of a factor cost whose matrix can be
    held are not used."""
    given_up: float = 6.0
    """Refills per row after which the lists of a factor cost are given up if its matrix can be held."""
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
