"""The paper's claims in small, measured on this machine: networks, measurements, claims, report."""

from fastmatch.study.claims import Claim, judge
from fastmatch.study.run import run

__all__ = ["Claim", "judge", "run"]
