"""The paper's claims at small scale, measured on this machine: measurements, claims, report."""

from fastmatch.studies.paper.claims import Claim, judge
from fastmatch.studies.paper.run import run

__all__ = ["Claim", "judge", "run"]
