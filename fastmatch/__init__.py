"""fastmatch: align, merge and renormalize wide networks of the same architecture."""

from fastmatch import assignment
from fastmatch.assignment import linear_sum_assignment, solve
from fastmatch.evaluation.between import Renormalized
from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.evaluation.distances import distances
from fastmatch.evaluation.layers import layer_table, running_statistics
from fastmatch.evaluation.scores import Scores, evaluate, score
from fastmatch.evaluation.table import Table
from fastmatch.evaluation.triangle import Triangle, triangle
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.align import align
from fastmatch.matching.align_many import align_many
from fastmatch.matching.fisher import FisherMatching
from fastmatch.matching.frank_wolfe import FrankWolfe
from fastmatch.matching.merge_many import MergeMany
from fastmatch.matching.mixture import Mixture
from fastmatch.matching.pairwise import Chain, ToReference
from fastmatch.matching.straight_through import StraightThrough
from fastmatch.matching.weights import WeightMatching
from fastmatch.merging.average import merge
from fastmatch.merging.biases import remove_biases
from fastmatch.merging.ensemble import Ensemble, ModelCost, model_cost
from fastmatch.merging.partial import PartialMerge, merge_partial
from fastmatch.merging.unit_rules import CCA, Identity, Permute, Zip
from fastmatch.permutations.alignment import Alignment, Matching
from fastmatch.permutations.verify import Verification, verify
from fastmatch.renorm import (
    EndpointStatistics,
    Plan,
    Renormalization,
    endpoint_statistics,
    plan_renormalization,
    renormalize,
    renormalize_many,
)
from fastmatch.spec import Axis, Group, PermutationSpec

__all__ = [
    "CCA",
    "ActivationMatching",
    "Alignment",
    "Axis",
    "Chain",
    "Curve",
    "EndpointStatistics",
    "Ensemble",
    "FisherMatching",
    "FrankWolfe",
    "Group",
    "Identity",
    "Matching",
    "MergeMany",
    "Mixture",
    "ModelCost",
    "PartialMerge",
    "PermutationSpec",
    "Permute",
    "Plan",
    "Renormalization",
    "Renormalized",
    "Scores",
    "StraightThrough",
    "Table",
    "ToReference",
    "Triangle",
    "Verification",
    "WeightMatching",
    "Zip",
    "align",
    "align_many",
    "assignment",
    "distances",
    "endpoint_statistics",
    "evaluate",
    "interpolate",
    "layer_table",
    "linear_sum_assignment",
    "merge",
    "merge_partial",
    "model_cost",
    "plan_renormalization",
    "remove_biases",
    "renormalize",
    "renormalize_many",
    "running_statistics",
    "score",
    "solve",
    "triangle",
    "verify",
]
