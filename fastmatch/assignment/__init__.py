"""The linear assignment problem: exact, with a certificate."""

from fastmatch.assignment.batched import solve_batched
from fastmatch.assignment.certificate import certificate
from fastmatch.assignment.factor import DenseCost, FactorCost
from fastmatch.assignment.solution import Assignment
from fastmatch.assignment.solve import METHODS, linear_sum_assignment, select_method, solve

__all__ = [
    "METHODS",
    "Assignment",
    "DenseCost",
    "FactorCost",
    "certificate",
    "linear_sum_assignment",
    "select_method",
    "solve",
    "solve_batched",
]
