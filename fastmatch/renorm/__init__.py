"""Renormalization of merged and pruned networks: statistics, plan, calibration, folding, and the data-free forms."""

from fastmatch.renorm.calibrate import MODES, renormalize, renormalize_many
from fastmatch.renorm.fold import EPS
from fastmatch.renorm.plan import METHODS, Plan, plan_renormalization
from fastmatch.renorm.statistics import GOALS, EndpointStatistics, endpoint_statistics

__all__ = [
    "EPS",
    "GOALS",
    "METHODS",
    "MODES",
    "EndpointStatistics",
    "Plan",
    "endpoint_statistics",
    "plan_renormalization",
    "renormalize",
    "renormalize_many",
]
