"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch.align import Alignment, align
from fastmatch.interpolate import Curve, evaluate, interpolate
from fastmatch.merge import merge
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
    "Curve",
    "EndpointStatistics",
    "Group",
    "PermutationSpec",
    "Plan",
    "Verification",
    "align",
    "endpoint_statistics",
    "evaluate",
    "interpolate",
    "merge",
    "normalize_biases",
    "plan_renormalization",
    "remove_biases",
    "renormalize",
    "renormalize_many",
    "verify",
]
