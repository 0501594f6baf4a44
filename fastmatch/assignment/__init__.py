"""The linear assignment problem, solved exactly and with a certificate."""

from fastmatch.assignment.batched import solve_batched
from fastmatch.assignment.candidate_lists import CandidateLists
from fastmatch.assignment.certificate import certificate
from fastmatch.assignment.cost import Cost, SoftCost
from fastmatch.assignment.dense_cost import DenseCost
from fastmatch.assignment.dense_shortlists import DenseShortlists
from fastmatch.assignment.device_cost import DeviceCost
from fastmatch.assignment.factor_cost import FactorCost
from fastmatch.assignment.lapjv import LapJV
from fastmatch.assignment.problem import Infeasible, LapProblem, LapSolution, Solver
from fastmatch.assignment.schedule import DenseSchedule, ListSchedule
from fastmatch.assignment.sharded_cost import ShardedCost
from fastmatch.assignment.small_dense import SmallDense
from fastmatch.assignment.solution import Assignment
from fastmatch.assignment.solve import linear_sum_assignment, select_solver, solve
from fastmatch_kernels.lap.schedule import SmallSchedule

__all__ = [
    "Assignment",
    "CandidateLists",
    "Cost",
    "DenseCost",
    "DenseSchedule",
    "DenseShortlists",
    "DeviceCost",
    "FactorCost",
    "Infeasible",
    "LapJV",
    "LapProblem",
    "LapSolution",
    "ListSchedule",
    "ShardedCost",
    "SmallDense",
    "SmallSchedule",
    "SoftCost",
    "Solver",
    "certificate",
    "linear_sum_assignment",
    "select_solver",
    "solve",
    "solve_batched",
]
