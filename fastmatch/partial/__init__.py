"""Partial merging: some layers of several models stay apart, the rest are merged."""

from fastmatch.partial.ensemble import Cost, Ensemble, cost_of
from fastmatch.partial.merge import PartialMerge, merge_partial
from fastmatch.partial.units import RULES

__all__ = ["RULES", "Cost", "Ensemble", "PartialMerge", "cost_of", "merge_partial"]
