"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch.align import Alignment, align, align_many
from fastmatch.interpolate import Curve, evaluate, interpolate
from fastmatch.merge import merge
from fastmatch.renorm import EndpointStatistics, endpoint_statistics, renormalize
from fastmatch.spec import Axis, Group, PermutationSpec
from fastmatch.verify import Verification, verify

__all__ = [
    "Alignment",
    "Axis",
    "Curve",
    "EndpointStatistics",
    "Group",
    "PermutationSpec",
    "Verification",
    "align",
    "align_many",
    "endpoint_statistics",
    "evaluate",
    "interpolate",
    "merge",
    "renormalize",
    "verify",
]
