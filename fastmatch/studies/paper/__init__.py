"""The paper's claims in small, measured on this machine: networks, measurements, claims, report."""

from fastmatch.studies.paper.claims import Claim, judge
from fastmatch.studies.paper.run import run

__all__ = ["Claim", "judge", "run"]
