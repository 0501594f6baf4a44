"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.evaluation.distances import distances
from fastmatch.evaluation.layers import layer_table, running_statistics
from fastmatch.evaluation.scores import Scores, evaluate, score
from fastmatch.evaluation.table import Table
from fastmatch.evaluation.triangle import Triangle, triangle
from fastmatch.matching.align import align, align_many
from fastmatch.merging.average import merge
from fastmatch.merging.biases import normalize_biases, remove_biases
from fastmatch.merging.ensemble import Cost, Ensemble, cost_of
from fastmatch.merging.partial import PartialMerge, merge_partial
from fastmatch.permutations.alignment import Alignment
from fastmatch.permutations.verify import Verification, verify
from fastmatch.renorm import (
    EndpointStatistics,
    Plan,
    endpoint_statistics,
    plan_renormalization,
    renormalize,
    renormalize_many,
)
from fastmatch.spec import Axis, Group, PermutationSpec

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
