"""When the phases of a small problem run. No numba here."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CROWDED_FROM", "SmallSchedule"]


class SmallSchedule(NamedTuple):
    """When the phases of a small problem run, and for how long."""

    auction_above: float = 0.1
    """Fraction of the rows: if row minima and row reduction leave more of them free, a short auction runs."""
    war_above: float = 0.9
    """Fraction of the free rows: if a bid per row leaves more of them free, the auction is a price war and ends."""
    war_few: float = 0.03
    """Fraction of the rows: fewer free rows are not a price war."""
    repeat_above: float = 0.28
    """Fraction of the rows: if a phase of the auction leaves more of them free, another one runs."""
    phases: int = 3
    """Phases of the auction at most."""
    first_eps: float = 0.15
    """The first phase's eps, in typical differences between a row's least two costs."""
    eps_factor: float = 0.2
    """The factor from one phase's eps to the next one's."""
    bids: int = 16
    """Bids per row and phase at most: more are a price war, and a smaller eps or a path ends it sooner."""
    reductions: int = 2
    """Rounds of augmenting row reduction."""
    extra_steps: float = 0.5
    """Steps of a round of row reduction beyond one per free row, per row of the problem."""
    reduce_from: int = 200
    """Rows from which row reduction runs before the auction, which it may save."""
    auction_from: int = 72
    """Rows from which an auction is tried: below, paths take less time."""
    dear_bids: float = 8.0
    """Bids that a row may take in a rectangle before a path is quicker."""
    crowded_from: int = 40
    """Rows from which other first duals are tried."""
    crowded_above: float = 0.42
    """Fraction of the rows: if more of them find their best columns taken, other first duals are tried. Random entries
    leave 1/e."""
    accepted_below: float = 0.15
    """Fraction of the rows: other first duals that leave no more of them free are taken at once, others only after a price
    war."""
    short_scans: float = 1.5
    """Scans per row: if paths from zeros are expected to take no more, no other first duals are tried."""
    short_tied_scans: float = 4.0
    """The same if half of the rows have ties for their best column."""
    better_minima: float = 0.7
    """Fraction of the free rows that the columns' minima may leave to be used."""
    better_centres: float = 0.85
    """The same for the columns' centres and means."""
    tail: float = 8.0
    """Distance of the least column minimum from their median, in distances between their quartiles, up to which minima
    are usual first duals."""


CROWDED_FROM = SmallSchedule().crowded_from
"""Rows from which a problem may be found crowded, by the default schedule."""
