# The public names, by task. fastmatch/__init__.py loads each on first use; type checkers read this file.

# isort: off

# Align two models, or many
from .matching.align import align as align
from .matching.align_many import align_many as align_many
from .matching.balance import balance as balance, Balanced as Balanced
from .permutations.alignment import Alignment as Alignment, Matching as Matching
from ._internal.ranks import alone as alone

# Matchers of two models
from .matching.weights import WeightMatching as WeightMatching
from .matching.activations import ActivationMatching as ActivationMatching
from .matching.fisher import FisherMatching as FisherMatching
from .matching.straight_through import StraightThrough as StraightThrough
from .matching.mixture import Mixture as Mixture

# Strategies for many models
from .matching.pairwise import ToReference as ToReference, Chain as Chain
from .matching.merge_many import MergeMany as MergeMany
from .matching.frank_wolfe import FrankWolfe as FrankWolfe

# Structure and proof
from .spec import PermutationSpec as PermutationSpec, Group as Group, Axis as Axis, Examples as Examples
from .permutations.verify import verify as verify, Verification as Verification

# Merge
from .merging.average import merge as merge
from .merging.biases import remove_biases as remove_biases
from .merging.task_vectors import move_task as move_task, task_vector as task_vector
from .merging.partial import merge_partial as merge_partial, PartialMerge as PartialMerge
from .merging.unit_rules import Identity as Identity, Permute as Permute, Zip as Zip, CCA as CCA
from .merging.ensemble import Ensemble as Ensemble, model_cost as model_cost, ModelCost as ModelCost

# Renormalize
from .renorm import (
    renormalize as renormalize,
    renormalize_many as renormalize_many,
    Renormalization as Renormalization,
    applied_plan as applied_plan,
    plan_renormalization as plan_renormalization,
    Plan as Plan,
    endpoint_statistics as endpoint_statistics,
    EndpointStatistics as EndpointStatistics,
)

# Evaluate
from .evaluation.scores import evaluate as evaluate, score as score, Scores as Scores
from .evaluation.curve import interpolate as interpolate, Curve as Curve
from .evaluation.triangle import triangle as triangle, Triangle as Triangle
from .evaluation.between import Renormalized as Renormalized
from .evaluation.layers import layer_table as layer_table, running_statistics as running_statistics
from .evaluation.distances import distances as distances
from .evaluation.table import Table as Table

# Report
from .report.merge import merge_report as merge_report
from .report.report import Report as Report

# All of it from one recipe
from .recipes.pipeline import pipeline as pipeline, Outcome as Outcome

# Assignment
from .assignment import solve as solve, linear_sum_assignment as linear_sum_assignment

# Packages
from . import assignment as assignment, backends as backends, checkpoint as checkpoint

__version__: str
