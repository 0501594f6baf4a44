"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch.align import Alignment, align, align_many
from fastmatch.analysis import distances, layer_table, running_statistics
from fastmatch.interpolate import Curve, Scores, Triangle, evaluate, interpolate, score, triangle
from fastmatch.merge import merge
from fastmatch.partial import Cost, Ensemble, PartialMerge, cost_of, merge_partial
from fastmatch.records import Table
from fastmatch.renorm import (
    EndpointStatistics,
    Plan,
    endpoint_statistics,
    normalize_biases,
    plan_renormalization,
    remove_biases,
    renormalize,
    renormalize_many,
)
from fastmatch.spec import Axis, Group, PermutationSpec
from fastmatch.verify import Verification, verify

__all__ = [
    "Alignment",
    "Axis",
    "Cost",
    "Curve",
    "EndpointStatistics",
    "Ensemble",
    "Group",
    "PartialMerge",
    "PermutationSpec",
    "Plan",
    "Scores",
    "Table",
    "Triangle",
    "Verification",
    "align",
    "align_many",
    "cost_of",
    "distances",
    "endpoint_statistics",
    "evaluate",
    "interpolate",
    "layer_table",
    "merge",
    "merge_partial",
    "normalize_biases",
    "plan_renormalization",
    "remove_biases",
    "renormalize",
    "renormalize_many",
    "running_statistics",
    "score",
    "triangle",
    "verify",
]
